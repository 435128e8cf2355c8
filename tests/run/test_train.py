"""The trainer: results load in plain diffusers, resume is exact, nothing bad passes silently."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mapo_fast.cli import app
from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.engine.step import training_inputs
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sampling import Sampling
from mapo_fast.run.feed import Feed
from mapo_fast.run.log import read_log
from mapo_fast.run.notes import earlier_checkpoint
from mapo_fast.run.preview import Previews
from mapo_fast.run.train import fit
from mapo_fast.run.trainer import Trainer
from mapo_fast.score import manifest
from mapo_fast.score.sample import open_for_sampling, sample
from mapo_fast.settings.schema import Config
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import exclusive
from tests.tiers import some_of
from tests.tiny import make_tiny_sdxl
from tests.training import make_cache, make_config, make_pairs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def make(tiny_sdxl: Path, cache: Path) -> Callable[..., Config]:
    def build(output: Path, **sections: dict[str, Any]) -> Config:
        train = {"evaluate_pairs": 2, **sections.pop("train", {})}  # of one there is no interval
        return make_config(tiny_sdxl, cache, output, train=train, **sections)

    return build


LORA8 = {
    "adapter": {"kind": "lora", "rank": 4},
    "optim": {"name": "adamw8bit", "lr": 1e-3},
    "train": {"gradient_checkpointing": True},
}
MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA8}
RESULT = {"full": "unet/diffusion_pytorch_model.safetensors", "lora": "lora/pytorch_lora_weights.safetensors"}


@pytest.fixture(scope="module")
def finished(make: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One uninterrupted run per mode."""
    outputs = {}
    for mode, sections in MODES.items():
        outputs[mode] = tmp_path_factory.mktemp("finished") / mode
        result = fit(make(outputs[mode], **sections))
        assert result.finished
        assert result.step == 6
    return outputs


@pytest.mark.slow
def test_a_full_fine_tune_loads_with_plain_diffusers(finished: dict[str, Path], tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(finished["full"] / "unet", local_files_only=True)
    start = open_sdxl(tiny_sdxl).load_unet().state_dict()
    moved = [not torch.equal(value, start[name]) for name, value in unet.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)
    saved = load_file(finished["full"] / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in unet.state_dict().items())
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, unet=unet, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red square", height=32, width=32, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


@pytest.mark.slow
def test_a_lora_loads_with_plain_diffusers(finished: dict[str, Path], tiny_sdxl: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    before = sum(float(p.detach().double().abs().sum()) for p in pipe.unet.parameters())
    pipe.load_lora_weights(finished["lora"] / "lora")
    factors = load_file(finished["lora"] / RESULT["lora"])
    assert sum(float(p.detach().double().abs().sum()) for p in pipe.unet.parameters()) > before
    assert any(bool(value.any()) for name, value in factors.items() if "lora_B" in name)
    assert (finished["lora"] / "lora" / "lora_kohya.safetensors").is_file()


@pytest.mark.slow
def test_the_log_has_every_figure_and_step_zero(finished: dict[str, Path]) -> None:
    entries = read_log(finished["full"] / "log.jsonl")
    steps = [e for e in entries if e["event"] == "step"]
    assert [e["step"] for e in steps] == [2, 4, 6]
    names = "loss chosen_error rejected_error margin logits saturation accuracy grad_norm lr pairs_per_s"
    assert all(torch.isfinite(torch.tensor(e[n])) for e in steps for n in names.split())
    assert all(e["peak_memory_mib"] > 0 and e["skipped_steps"] == 0 for e in steps)
    looks = [e for e in entries if e["event"] == "evaluation"]
    assert [e["step"] for e in looks] == [0, 6]
    assert looks[0]["accuracy_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert looks[0]["drift"] == 0.0
    assert looks[1]["drift"] > 0.0
    assert looks[1]["draws"] >= 8
    assert list((finished["full"] / "tensorboard").iterdir())


def _same(one: Path, other: Path, mode: str) -> bool:
    """Whether two results hold the same bits (safetensors does not fix the order of its metadata)."""
    found, expected = load_file(one / RESULT[mode]), load_file(other / RESULT[mode])
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in found)


def _in_child(config: Config, resume: bool, kill_after: float = 0.0) -> Any:
    """Train in a forked process: as killable as a command, without its seconds of imports.

    With `kill_after` the system ends it after so many seconds of its own CPU time (SIGPROF, which nothing
    handles).
    """

    def run() -> None:
        signal.setitimer(signal.ITIMER_PROF, kill_after)
        fit(config, resume=resume)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _cpu_seconds(config: Config) -> float:
    """CPU time of an uninterrupted training."""
    before = os.times()
    _in_child(config, resume=False).join()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", some_of(MODES, ["full"]))
def test_killed_at_any_moment_and_resumed_is_bit_identical(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    run = tmp_path / "run"
    config = make(run, **MODES[mode])
    undisturbed = _cpu_seconds(make(tmp_path / "other", **MODES[mode]))
    chance = random.Random(mode)
    kills = kills_after_a_checkpoint = 0
    for _ in range(40):
        enough = kills >= 3 and kills_after_a_checkpoint
        moment = 0.0 if enough else undisturbed * chance.uniform(0.2, 0.9)
        process = _in_child(config, resume=run.exists(), kill_after=moment)
        process.join()
        if process.exitcode == -signal.SIGPROF:
            kills += 1
            kills_after_a_checkpoint += any((run / "checkpoints").glob("step-*"))
            continue
        assert process.exitcode == 0
        if enough:
            break
        shutil.rmtree(run)  # it was faster than its death: once more
    assert kills_after_a_checkpoint
    assert _same(run, finished[mode], mode)
    assert [e["step"] for e in read_log(run / "log.jsonl") if e["event"] == "step"] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_the_resume_is_bit_identical(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    config = make(tmp_path / "run", train={"checkpoint_every": 0})
    process = _in_child(config, resume=False)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and '"event": "step"' in log.read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert fit(config, resume=True).finished
    assert (tmp_path / "run" / RESULT["full"]).read_bytes() == (
        finished["full"] / RESULT["full"]
    ).read_bytes()


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_and_says_so(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(finished["full"], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    result = fit(make(tmp_path / "run"), resume=True)
    assert result.finished
    warnings = [e["message"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "warning"]
    assert any("step-00000006 cannot be used" in w and "falling back to step-00000004" in w for w in warnings)
    assert (tmp_path / "run" / RESULT["full"]).read_bytes() == (
        finished["full"] / RESULT["full"]
    ).read_bytes()


@pytest.mark.slow
def test_a_finished_run_resumes_to_nothing(make: Callable[..., Config], finished: dict[str, Path]) -> None:
    before = (finished["full"] / RESULT["full"]).read_bytes()
    result = fit(make(finished["full"]), resume=True)
    assert (result.step, result.finished) == (6, True)
    assert (finished["full"] / RESULT["full"]).read_bytes() == before


@pytest.mark.slow
def test_a_used_output_folder_is_refused_untouched(
    make: Callable[..., Config], finished: dict[str, Path]
) -> None:
    def listing() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in finished["full"].rglob("*"))

    before = listing()
    with pytest.raises(UserError, match="already holds a run"):
        fit(make(finished["full"]))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001 and is now 0\.1"):
        fit(make(finished["full"], optim={"lr": 0.1}), resume=True)
    assert listing() == before


class _Poisoned(torch.nn.Module):
    """The real loss, not finite on chosen calls."""

    def __init__(self, loss: torch.nn.Module, bad: set[int]) -> None:
        super().__init__()
        self.loss, self.bad, self.calls = loss, bad, 0

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> Any:
        self.calls += 1
        poison = float("nan") if self.calls in self.bad else 1.0
        return self.loss(prediction * poison, target)


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA8], ids=["full", "lora"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    from mapo_fast.run import trainer as module

    build = module.build_loss
    monkeypatch.setattr(module, "build_loss", lambda *a: _Poisoned(build(*a), {2, 3}))
    result = fit(make(tmp_path / "run", **sections))
    assert result.finished
    assert result.skipped_steps == 2
    last = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step"][-1]
    assert last["skipped_steps"] == 2
    assert last["chosen_error"] > 0
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def _last_message(make_config: Config, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit(make_config, **kwargs)
    return str(caught.value)


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run_with_the_last_good_state(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is not finite, the model is: its weights are those of the last good step."""
    from mapo_fast.run import trainer as module

    build = module.build_loss
    monkeypatch.setattr(module, "build_loss", lambda *a: _Poisoned(build(*a), set(range(3, 99))))
    good = fit(make(tmp_path / "good", train={"steps": 2, "checkpoint_every": 0}))
    message = _last_message(make(tmp_path / "run", train={"max_skipped_steps": 1, "checkpoint_every": 0}))
    assert message.startswith("2 steps in a row were not finite (train.max_skipped_steps = 1)")
    assert "saved at step 4" in message
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    expected = load_file(good.output / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def _diverge_at(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the update of step `last` make the weights useless."""
    step = Trainer._step

    def diverging(self: Trainer, micro_batches: Any) -> torch.Tensor:
        norm = step(self, micro_batches)
        if self.step == last:
            with torch.no_grad():
                self.unet.conv_in.weight.fill_(float("nan"))
        return norm

    monkeypatch.setattr(Trainer, "_step", diverging)


@pytest.mark.slow
def test_a_diverged_model_does_not_replace_good_checkpoints(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth update makes the weights useless, though its own step was finite."""
    _diverge_at(5, monkeypatch)
    settings = {"max_skipped_steps": 1, "checkpoint_every": 1, "keep_checkpoints": 2, "steps": 20}
    message = _last_message(make(tmp_path / "run", train={**settings, "log_every": 1}))
    assert "the model has diverged" in message
    assert "step 4" in message
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


@pytest.mark.slow
def test_a_run_that_ends_diverged_has_no_result(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _diverge_at(6, monkeypatch)
    assert "the run's last step: the model has diverged" in _last_message(make(tmp_path / "run"))
    assert not (tmp_path / "run" / "unet").exists()
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.slow
def test_a_failing_preview_loses_no_training(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preview = {"prompts": ["red"], "steps": 1, "every": 3}
    config = make(tmp_path / "run", preview=preview, train={"checkpoint_every": 0})
    write = Previews.write

    def once(self: Any, unet: Any, step: int, context: Any, *, main: bool) -> None:
        write(self, unet, step, context, main=main)
        previews = tmp_path / "run" / "previews"
        shutil.rmtree(previews)
        previews.touch()  # the next preview cannot make its folder

    monkeypatch.setattr(Previews, "write", once)
    assert "cannot write" in _last_message(config)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder(make: Callable[..., Config], finished: dict[str, Path]) -> None:
    with exclusive(finished["full"]):
        assert "in use by another" in _last_message(make(finished["full"]), resume=True)
    assert fit(make(finished["full"]), resume=True).finished


@pytest.mark.slow
def test_a_resume_measures_a_lost_start_again(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path
) -> None:
    for mode, sections in MODES.items():
        output = shutil.copytree(finished[mode], tmp_path / mode)
        start = output / "held_out_start.safetensors"
        before = load_file(start)
        start.unlink()
        fit(make(output, **sections), resume=True)
        again = load_file(start)
        assert before.keys() == again.keys()
        assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.slow
def test_a_resume_under_another_noise_schedule_is_refused(
    cache: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    config = make_config(model, cache, tmp_path / "run", train={"steps": 2})
    fit(config)
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    assert "the noise schedule is not the one" in _last_message(config, resume=True)


@pytest.mark.slow
def test_fewer_steps_than_are_done_are_refused(
    make: Callable[..., Config], finished: dict[str, Path]
) -> None:
    message = _last_message(make(finished["full"], train={"steps": 3}), resume=True)
    assert "train.steps = 3" in message
    assert "already at step 6" in message


def test_noise_timestep_and_dropped_caption_are_the_pairs_own(cache: Path, tiny_sdxl: Path) -> None:
    pairs = PairCache.open(cache)
    diffusion = Diffusion(open_sdxl(tiny_sdxl).scheduler_config)
    settings: dict[str, Any] = {"seed": 5, "epoch": 2, "caption_dropout": 0.5, "device": torch.device("cpu")}
    members = [pairs.train[i] for i in range(6)]
    together = training_inputs(pairs, members, diffusion, **settings)
    for index, pair in enumerate(members):
        alone = training_inputs(pairs, [pair], diffusion, **settings)
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part[0], whole[index])
            assert torch.equal(part[1], whole[len(members) + index])
        assert torch.equal(alone.target[0], alone.target[1])  # ε-prediction: the target is the shared noise
        assert alone.timesteps[0] == alone.timesteps[1]
        assert torch.equal(alone.prompt_embeds[0], alone.prompt_embeds[1])
    dropped = [bool((e == 0).all()) for e in together.prompt_embeds]
    assert dropped[:6] == dropped[6:]
    assert 0 < sum(dropped[:6]) < 6
    assert together.time_ids.dtype == torch.float32


@pytest.mark.slow
def test_objectives_share_their_draws(make: Callable[..., Config], tmp_path: Path) -> None:
    """Before the first update the errors of MaPO and SFT are the same numbers."""
    errors = []
    for name in ("mapo", "sft"):
        output = tmp_path / name
        fit(make(output, objective={"name": name}, train={"steps": 1, "log_every": 1}))
        first = next(e for e in read_log(output / "log.jsonl") if e["event"] == "step")
        errors.append((first["chosen_error"], first["rejected_error"]))
    assert errors[0] == errors[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "train_settings",
    [
        {"layout": "joint"},
        {"layout": "joint", "gradient_checkpointing": False},
        {"precision": "bf16"},
        {"precision": "pure_bf16"},
        {"pairs_per_batch": 1, "accumulation": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_layout_and_precision_trains(
    make: Callable[..., Config], tmp_path: Path, kind: str, train_settings: dict[str, Any]
) -> None:
    config = make(tmp_path / "run", adapter={"kind": kind, "rank": 4}, train={"steps": 2, **train_settings})
    assert fit(config).finished
    entries = read_log(tmp_path / "run" / "log.jsonl")
    assert entries[-1]["finished"]
    warned = any("rounds updates" in e.get("message", "") for e in entries)
    assert warned == (train_settings.get("precision") == "pure_bf16")
    # the warm-up of these runs is as long as they are
    assert any("never reaches optim.lr" in e.get("message", "") for e in entries)


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_of(RESULT, ["full"]))
def test_pure_bf16_with_stochastic_rounding_resumes_bit_for_bit(
    make: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """Step and seed go into the checkpoint; so the weights after it have the same random bits."""
    common: dict[str, Any] = {
        "adapter": {"kind": kind, "rank": 4},
        "optim": {"name": "adamw8bit", "lr": 1e-5, "warmup_steps": 0},
    }
    settings = {"precision": "pure_bf16", "steps": 4}
    whole = fit(make(tmp_path / "whole", train=settings, **common))
    assert not any("rounds updates" in e.get("message", "") for e in read_log(whole.output / "log.jsonl"))
    fit(make(tmp_path / "parts", train={**settings, "steps": 2}, **common))
    parts = fit(make(tmp_path / "parts", train=settings, **common), resume=True)
    expected, found = (load_file(run.output / RESULT[kind]) for run in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = load_file(tmp_path / "parts" / "checkpoints" / "step-00000002" / "model.safetensors")
    end = load_file(tmp_path / "parts" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert {value.dtype for value in end.values()} == {torch.bfloat16}
    assert any(not torch.equal(start[name], end[name]) for name in end)


@pytest.mark.slow
def test_v_prediction_with_zero_terminal_snr_and_an_fp16_only_folder(cache: Path, tmp_path: Path) -> None:
    """The scheduler config is read; the same VAE and encoders keep the cache valid."""
    model = make_tiny_sdxl(tmp_path / "v", prediction_type="v_prediction", zero_terminal_snr=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (plain,) = (model / name).glob("*.safetensors")
        plain.rename(plain.with_suffix(".fp16.safetensors"))
    data = make_cache(model, tmp_path / "data")
    output = tmp_path / "run"
    fit(make_config(model, data, output, train={"steps": 2}, preview={"prompts": ["red"], "steps": 2}))
    written = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert (written["prediction_type"], written["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert len(list((output / "previews").glob("*/*.png"))) == 2
    with pytest.raises(UserError, match="zero terminal SNR with epsilon-prediction"):
        fit(make_config(model, data, tmp_path / "other", train={"prediction": "epsilon"}))


def test_a_cache_of_another_model_is_refused(cache: Path, tmp_path: Path) -> None:
    other = make_tiny_sdxl(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="cache"):
        fit(make_config(other, cache, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_previews_are_the_same_prompts_and_noise(
    make: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    """And those that `mapo-fast sample` makes, which reads prompts in the same way."""
    preview = {"prompts": ["red", "(blue:1.2)"], "steps": 2, "every": 1, "seed": 3}
    fit(make(tmp_path / "run", train={"steps": 2}, optim={"lr": 1e-12}, preview=preview))
    sheet, *folders = sorted((tmp_path / "run" / "previews").iterdir())
    assert sheet.name == "contact-sheet.png"
    assert [f.name for f in folders] == ["step-00000000", "step-00000001", "step-00000002"]
    first, last, other = (
        Image.open(path)
        for path in (folders[0] / "00-red.png", folders[2] / "00-red.png", folders[0] / "01-blue.png")
    )
    assert first.tobytes() == last.tobytes() != other.tobytes()
    assert first.text["parameters"].startswith("red\nSteps: 2, Sampler: Euler, CFG scale: 5, Seed: 3, Size: ")
    how = Sampling(sampler="euler", steps=2, cfg=5.0, width=first.width, height=first.height)
    sample(open_for_sampling(tiny_sdxl), ["red", "blue"], [3], how, tmp_path / "sampled")
    sampled = [Image.open(made.path).tobytes() for made in manifest.read(tmp_path / "sampled")]
    assert sampled == [first.tobytes(), other.tobytes()]
    [board] = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"previews/01-blue" in board.read_bytes()


@pytest.mark.slow
def test_a_warning_names_a_command_that_works(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make(tmp_path / "a run", adapter={"kind": "lora", "rank": 2}, train={"steps": 2})
    fit(config)
    said = earlier_checkpoint(config, CheckpointStore(tmp_path / "a run" / "checkpoints", 1))
    command = shlex.split(said[said.index("mapo-fast ") :])
    assert command[:2] == ["mapo-fast", "export"]
    target = tmp_path / command.pop()
    result = CliRunner().invoke(app, [*command[1:], str(target)])
    assert result.exit_code == 0, result.output
    assert target.is_file()


def test_missing_xformers_is_named(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"train\.attention = 'xformers' cannot be used .*use 'sdpa'"):
        fit(make(tmp_path / "run", train={"attention": "xformers"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_vae_goes_with_its_own_cache(tiny_sdxl: Path, tmp_path: Path) -> None:
    other = {"vae": str(make_tiny_sdxl(tmp_path / "other", seed=5) / "vae")}
    source = make_pairs(tmp_path / "pairs", 12)
    prepare(make_config(tiny_sdxl, tmp_path / "cache", tmp_path, model=other, data={"source": str(source)}))
    preview = {"prompts": ["red"], "steps": 1}
    config = make_config(
        tiny_sdxl, tmp_path / "cache", tmp_path / "run", model=other, train={"steps": 1}, preview=preview
    )
    assert fit(config).finished
    without = make_config(tiny_sdxl, tmp_path / "cache", tmp_path / "without", train={"steps": 1})
    assert "another VAE" in _last_message(without)


@pytest.mark.slow
@pytest.mark.parametrize("stated", [{}, {"fused_ops": True}])
def test_on_the_cpu_what_runs_is_planned(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: dict[str, bool]
) -> None:
    seen: list[Config] = []

    def planned(config: Config, *_: Any) -> tuple[Config, None]:
        seen.append(config)
        return config, None

    monkeypatch.setattr("mapo_fast.run.settings.planned", planned)
    config = make(tmp_path / "run", speed=stated)
    assert fit(config).finished
    speed = seen[0].speed
    assert (speed.fused_ops, speed.prefetch) == (bool(stated), False)


def _meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Any]) -> None:
    """Let something happen while the next run, which has looked at its output folder, loads its model."""
    from mapo_fast.run import train as module

    build = module.build_unet

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(module, "build_unet", build)
        happens()
        return build(*args)

    monkeypatch.setattr(module, "build_unet", slow)


@pytest.mark.slow
def test_a_run_that_ended_meanwhile_is_not_written_over(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs found the folder empty: the second one is refused."""
    run = tmp_path / "run"
    before: dict[Path, bytes] = {}

    def another() -> None:
        fit(make(run, train={"steps": 2}))
        before.update({path: path.read_bytes() for path in run.rglob("*") if path.is_file()})

    _meanwhile(monkeypatch, another)
    assert "already holds a run" in _last_message(make(run, train={"steps": 2}, optim={"lr": 0.1}))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / RESULT["full"] in before


@pytest.mark.slow
def test_a_resume_goes_on_from_what_another_process_saved_meanwhile(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has pruned the checkpoint that was the newest."""
    keep = {"keep_checkpoints": 1}
    fit(make(tmp_path / "run", train={"steps": 2, **keep}))
    another = make(tmp_path / "run", train={"steps": 4, **keep})
    _meanwhile(monkeypatch, lambda: fit(another, resume=True))
    assert fit(make(tmp_path / "run", train=keep), resume=True).finished
    assert _same(tmp_path / "run", finished["full"], "full")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [e["step"] for e in log if e["event"] == "start"] == [0, 2, 4]


@pytest.mark.slow
def test_a_damaged_start_is_measured_again_and_said(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(finished["full"], tmp_path / "run")
    path = run / "held_out_start.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fit(make(run), resume=True)
    assert path.read_bytes() == whole
    said = [e["message"] for e in read_log(run / "log.jsonl") if e["event"] == "warning"]
    assert f"{path} does not match its checksum: measured again" in said


@pytest.mark.slow
def test_a_start_copied_from_another_run_is_measured_again(
    make: Callable[..., Config], finished: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(finished["lora"], tmp_path / "run")
    shutil.copy(finished["full"] / "held_out_start.safetensors", run)
    fit(make(run, **LORA8), resume=True)
    said = [e["message"] for e in read_log(run / "log.jsonl") if e["event"] == "warning"]
    assert any("is another file under this name" in message for message in said)


@pytest.mark.slow
def test_where_most_steps_were_skipped_the_checkpoint_stays_and_no_result_is_written(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a row: train.max_skipped_steps never stops it."""
    from mapo_fast.run import trainer as module

    build = module.build_loss
    monkeypatch.setattr(module, "build_loss", lambda *a: _Poisoned(build(*a), {1, 2, 4, 6}))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"^4 of 6 steps were not finite and were skipped") as caught:
            fit(make(tmp_path / "run", train={"max_skipped_steps": 5}), resume=resume)
        assert caught.value.exit_code == 1
        assert not (tmp_path / "run" / "unet").exists()
        weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA8], ids=["full", "lora"])
def test_a_start_model_that_is_not_finite_is_named_before_anything_is_written(
    make: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    (path,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(path)
    tensors["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    config = make(tmp_path / "run", model={"path": str(model)}, **sections)
    with pytest.raises(UserError, match="the start model's weights or predictions are not finite") as error:
        fit(config)
    assert str(model / "unet") in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_not_called_diverged_for_what_its_first_pair_holds(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first micro-batch always has NaN in it, as an old cache may; the model is healthy."""
    inputs = Feed.inputs

    def poisoned(self: Feed, epoch: int, pairs: Any) -> Any:
        made = inputs(self, epoch, pairs)
        if (epoch, pairs) == self.batches.at(0):
            made.prompt_embeds[:, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(Feed, "inputs", poisoned)
    result = fit(make(tmp_path / "run"))
    assert (result.finished, result.skipped_steps) == (True, 1)
    assert (tmp_path / "run" / RESULT["full"]).is_file()


@pytest.mark.slow
def test_the_one_checkpoint_that_is_kept_is_not_the_diverged_models(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of step 5 are useless though its own figures were finite: it is not saved."""
    _diverge_at(5, monkeypatch)
    settings = {"max_skipped_steps": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "steps": 20}
    message = _last_message(make(tmp_path / "run", train={**settings, "log_every": 1}))
    assert "The newest checkpoint from before that is step 4 in" in message
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


@pytest.mark.slow
def test_a_checkpoint_that_may_be_of_the_diverged_model_is_not_called_older(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it looked healthy as it was saved, and no older one is left."""
    _diverge_at(5, monkeypatch)
    monkeypatch.setattr(Trainer, "healthy", lambda self: self.step in (0, 5))
    settings = {"max_skipped_steps": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "steps": 20}
    message = _last_message(make(tmp_path / "run", train={**settings, "log_every": 1}))
    assert "The only checkpoint that is left, step 5 in" in message
    assert "may be of the diverged model (train.keep_checkpoints = 1)" in message


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
def test_a_checkpoint_says_how_to_use_it_and_that_works(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    folder = finished[mode] / "checkpoints" / "step-00000006"
    text = (folder / "README.txt").read_text()
    assert "step 6 of 6" in text
    assert "repeat its command with --resume" in text
    code = "\n".join(
        line[4:] for line in text.splitlines() if line.startswith("    ") and "  " not in line[4:]
    )
    monkeypatch.chdir(folder)
    made: dict[str, Any] = {}
    exec(code, made)
    unet = made["pipe"].unet
    if mode == "full":
        found = unet.state_dict()
        expected = load_file(finished[mode] / RESULT[mode])
    else:
        found = {n.replace(".step.", "."): p for n, p in unet.named_parameters() if ".lora_" in n}
        expected = {n.removeprefix("unet."): t for n, t in load_file(finished[mode] / RESULT[mode]).items()}
        assert {m.scaling["step"] for m in unet.modules() if hasattr(m, "lora_A")} == {1.0}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
