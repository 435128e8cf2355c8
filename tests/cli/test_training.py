"""One command from a model and a folder of pairs to a LoRA's file, and what little a mistake costs."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mapo_fast import cli
from mapo_fast.demo import score, world
from mapo_fast.demo.run import TINY_SDXL
from mapo_fast.models.open import open_sdxl
from mapo_fast.util.files import exclusive
from tests.files_of_models import make_file
from tests.training import make_images, make_pairs

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.resolution=32", "data.bucket_step=32", "data.held_out=0.2", "train.precision=fp32",
    "optim.name=adamw", "optim.warmup_steps=0", "train.accumulation=2", "train.evaluate_pairs=4",
    "preview.prompts=[]", "train.threads=1",
]  # fmt: skip


def _options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def run(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs a command in a folder with a model and pairs; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_sdxl)
    make_pairs(tmp_path / "my pairs", count=12)

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mapo-fast", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        found = capsys.readouterr()
        return stop.value.code, found.err if stop.value.code else found.out

    return command


@pytest.mark.slow
def test_one_command_prepares_trains_exports_and_copies(run: Any, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    one = ["train", "--preset", "lora", "--model", "base", "--data", "my pairs"]
    small = _options(*SMALL, "train.epochs=0.5", "train.export_every=1")
    name = f"{(tmp_path / 'base').resolve().name}-my_pairs"
    code, out = run(*one, *small, "--copy-to", "loras")
    assert code == 0, out
    files = sorted((tmp_path / "runs" / name / "exports").iterdir())
    assert [file.name for file in files] == [f"{name}-1-step{step:06d}.safetensors" for step in (1, 2, 3)]
    lines = out.splitlines()
    assert "3 steps of 2 pairs; memory and time are not predicted here" in lines
    copy = tmp_path / "loras" / f"{name}-1.safetensors"
    assert lines[-2:] == [
        f"ComfyUI, A1111: {copy}, start at strength 1.0",
        f"diffusers: pipe.load_lora_weights({str(tmp_path / 'runs' / name / 'lora')!r})",
    ]
    last = load_file(files[-1])
    assert last.keys() == load_file(copy).keys()
    assert all(torch.equal(last[key], tensor) for key, tensor in load_file(copy).items())
    with safe_open(files[0], framework="pt") as first:
        assert first.metadata()["ss_steps"] == "1"

    code, err = run(*one, *small)
    assert (code, "--resume" in err, f"runs/{name}-2" in err) == (2, True, True)

    # Another run of the same name prepares nothing again and overwrites no copy; 3 steps are as 0.5 epochs.
    code, out = run(*one, *_options(*SMALL, "train.steps=3"), "--copy-to", "loras", "--out", "runs/again")
    assert code == 0
    assert "images ━" not in out
    assert {file.name for file in (tmp_path / "loras").iterdir()} == {copy.name}, "the same bytes"
    code, out = run(*one, *_options(*SMALL, "train.steps=2"), "--copy-to", "loras", "--out", "runs/third")
    assert (tmp_path / "loras" / f"{name}-2.safetensors").is_file()


@pytest.mark.slow
def test_resume_alone_takes_the_only_unfinished_run(run: Any, tmp_path: Path) -> None:
    one = ["train", "--preset", "lora", "--model", "base", "--data", "my pairs", *_options(*SMALL)]
    assert run("train", "--resume")[1].startswith("mapo-fast: --resume: no run in")
    for folder in ("a", "b"):
        assert run(*one, "--out", f"runs/{folder}", "--set", "train.steps=2")[0] == 0
        shutil.rmtree(tmp_path / "runs" / folder / "lora")
    code, err = run("train", "--resume")
    assert (code, "runs/a, runs/b" in err, "--out" in err) == (2, True, True)
    code, out = run("train", "--resume", "--out", "runs/a", "--set", "train.steps=3")
    assert (code, "step 3/3" in out) == (0, True)
    code, out = run("train", "--resume")
    assert (code, "runs/b/lora" in out) == (0, True)


@pytest.mark.slow
def test_mistakes_are_one_line(run: Any, tmp_path: Path) -> None:
    one = ["train", "--preset", "lora", "--model", "base", "--data", "my pairs", *_options(*SMALL)]
    make_images(tmp_path / "singles")
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "held").mkdir(parents=True)
    for words, expected in (
        (["train"], "which settings? Name a recipe, such as --preset lora"),
        (["train", "--preset", "lora", "--data", "x"], "which model? Name it with --model"),
        (["train", "--preset", "lora", "--model", "base"], "which data? Name the folder"),
        ([*one, "--data", "nothing"], "data.source not found: nothing"),
        ([*one, "--data", "empty"], "data.source empty is an empty folder: a pair is two images"),
        (
            [*one, "--data", "singles"],
            "from pairs (chosen, rejected), data.source singles holds single",
        ),
        ([*one, "--model", "nothing"], "model not found: nothing (model.path must be"),
        ([*one, "--lora", "no.safetensors=0.5"], "LoRA not found: no.safetensors"),
        ([*one, "--set", "train.epochs=2", "--set", "train.steps=3"], "both say how long the run is"),
        ([*one, "--set", "adapter.kind=full", "--set", "train.export_every=3"], "train.export_every writes"),
        ([*one, "--copy-to", "nowhere"], "--copy-to nowhere: there is no such folder"),
        ([*one, "--preset", "lroa"], "there is no such preset; there are lora, "),
        (
            [*one, "--learning_rate=1e-4"],
            "no option --learning_rate; settings are given by --set",
        ),
        (
            [*one, "--network-dim", "16"],
            "no option --network-dim; settings are given by --set",
        ),
        ([*one, "--steps", "16"], "(did you mean train.steps or preview.steps?)"),
    ):
        code, err = run(*words)
        assert (code, err.count("\n")) == (2, 1), err
        assert expected in err
    (tmp_path / "runs" / "held" / ".lock").touch()
    with exclusive(tmp_path / "runs" / "held"):
        code, err = run(*one, "--out", "runs/held")
    assert (code, "is in use by another mapo-fast process" in err) == (2, True)
    assert run("prepare", *one[1:])[0] == 0
    code, err = run(*one, "--set", "data.resolution=64")
    assert (code, "was made for data.resolution = 32, the config says 64" in err) == (2, True)


_SCRIPT = """\
import sys
sys.argv[0] = "mapo-fast"
from mapo_fast.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules], file=sys.stderr)
"""


def _cpu(words: list[str], folder: Path) -> tuple[float, str]:
    """CPU time of a Python process, and what it wrote to standard error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed code is compiled once
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


@pytest.mark.slow
def test_mistakes_cost_a_quarter_of_importing_torch(run: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = ["train", "--preset", "lora", "--model", "base", "--data", "my pairs", *_options(*SMALL)]
    assert run(*one, "--out", "runs/there", "--set", "train.steps=1")[0] == 0
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "chosen": b"x"}]), tmp_path / "a.parquet")
    cases = {
        "help": (["--help"], 0.15),
        "help of train": (["train", "--help"], 0.25),
        "typo": ([*one, "--set", "train.stps=3"], 0.25),
        "missing data": ([*one, "--data", "nothing"], 0.25),
        "missing model": ([*one, "--model", "nothing"], 0.25),
        "missing cache": (["train", "--preset", "lora", "--model", "base", "--set", "data.cache=no"], 0.25),
        "output in use": ([*one, "--out", "runs/there"], 0.25),
        "changed resolution": ([*one, "--out", "runs/new", "--set", "data.resolution=64"], 0.25),
        "parquet": ([*one, "--data", "a.parquet"], 0.35),
        "doctor": (["doctor"], 1.6),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(5):  # each beside its own import of torch: a machine's speed changes within a minute
        torch_s, _ = _cpu(["-c", "import torch"], tmp_path)
        rounds.append({})
        for name, (words, _) in cases.items():
            seconds, err = _cpu(["-c", _SCRIPT, *words], tmp_path)
            rounds[-1][name] = seconds / torch_s
            *lines, loaded = err.splitlines()
            if name != "doctor":
                assert loaded == "[]", f"{name} imports {loaded}"
                assert len(lines) == (0 if "help" in name else 1), err
    ratios = {name: round(statistics.median(one[name] for one in rounds), 3) for name in cases}
    print(ratios)
    assert {name for name, (_, limit) in cases.items() if ratios[name] > limit} == set(), ratios


@pytest.mark.slow
def test_a_file_and_two_folders_become_a_lora_that_raises_the_preferred_share(
    run: Any, tmp_path: Path
) -> None:
    """A person's whole way: the demo's world and settings, and plain diffusers to load the result."""
    make_file(TINY_SDXL, tmp_path / "tiny.safetensors")
    for index, (prompt, chosen, rejected) in enumerate(world.preference_pairs(288, 0)):
        for side, drawing in (("w", chosen), ("l", rejected)):
            folder = tmp_path / "drawn" / side
            folder.mkdir(parents=True, exist_ok=True)
            drawing.image().save(folder / f"{index:03d}.png")
        (tmp_path / "drawn" / "w" / f"{index:03d}.txt").write_text(prompt)
    demo = _options(
        *SMALL, "train.accumulation=1", "train.pairs_per_batch=4", "train.steps=100", "optim.lr=1e-3",
        "train.evaluate_every=0", "train.checkpoint_every=0", f"model.tokenizers={TINY_SDXL}",
    )  # fmt: skip
    code, out = run("train", "--preset", "lora", "--model", "tiny.safetensors", "--data", "drawn", *demo)
    assert code == 0, out
    model = open_sdxl(TINY_SDXL)
    prompts = score.make_prompts(model, with_colour=False, count=96, seed=0, device="cpu")
    shares = []
    for lora in (None, tmp_path / "runs" / "tiny-drawn" / "tiny-drawn-1.safetensors"):
        from diffusers import StableDiffusionXLPipeline

        pipe = StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, local_files_only=True)
        if lora is not None:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name, local_files_only=True)
        samples = score.sample(pipe.unet, pipe.vae, model, prompts, 12)
        shares.append(score.share(samples, prompts, score.preferred))
    (_, (_, before)), (_, (after, _)) = shares
    assert after > before, shares
