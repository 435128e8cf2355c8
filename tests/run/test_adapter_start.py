"""Training goes on from a LoRA: its start is base + LoRA, for the objective too, and stays so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.engine import compile as compile_module
from mapo_fast.engine.build import build_unet, start_of
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.objectives import build_loss
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.models.identity import encoders_identity, unet_identity
from mapo_fast.models.lora_file import read_lora
from mapo_fast.models.merge import with_loras
from mapo_fast.models.open import open_model, open_sdxl
from mapo_fast.models.sdxl import pooled_width
from mapo_fast.models.start import with_start
from mapo_fast.planner.trace import record_step
from mapo_fast.run.export import about_checkpoint
from mapo_fast.run.train import fit
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorheader import read_header
from tests.data.preparing import counting_images
from tests.training import make_config, make_pairs

FP64 = Precision(torch.float64, torch.float64, None, scaled=False)
CPU = torch.device("cpu")
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
RANKS = {f"{ATTENTION}.attn1.to_q": 2, f"{ATTENTION}.attn2.to_k": 3, "mid_block.resnets.0.conv1": 4}
KOHYA = "lora_kohya.safetensors"
TEXT = {"text_encoder": "text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2": "text_projection"}


@pytest.fixture(scope="module")
def start(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks that differ, alphas that are not the ranks, a convolution, and both text encoders."""
    parts, state = open_sdxl(tiny_sdxl).parts, {}
    generator = torch.Generator().manual_seed(0)
    layers = [("unet", f"unet.{n}", n, r) for n, r in RANKS.items()]
    layers += [(c, f"{c}.{n}", n.removeprefix("text_model."), 2) for c, n in TEXT.items()]
    for component, key, name, rank in layers:
        out, *rest = parts[component].shapes[f"{name}.weight"]
        tail = (1, 1) if len(rest) == 3 else ()
        state[f"{key}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator) * 0.1
        state[f"{key}.lora_B.weight"] = torch.randn(out, rank, *tail, generator=generator) * 0.1
        state[f"{key}.alpha"] = torch.tensor(1.5 * rank)
    save_file(state, path := tmp_path_factory.mktemp("start") / "start.safetensors")
    return path


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    config = config_of(tiny_sdxl, root / "cache", root / "run", start)
    prepare(config.model_copy(update={"data": {**dict(config.data), "source": make_pairs(root / "pairs")}}))
    return root / "cache"


def config_of(model: Path, cache: Path, output: Path, start: Path, **sections: Any) -> Config:
    sections["adapter"] = {"kind": "lora", "start": str(start), **sections.get("adapter", {})}
    return make_config(model, cache, output, **{"objective": {"name": "dpo"}, **sections})


@pytest.mark.parametrize("reference", ["adapter", "precomputed"])
def test_the_start_is_base_and_lora_and_the_margin_is_zero(
    tiny_sdxl: Path, start: Path, tmp_path: Path, reference: str
) -> None:
    objective = {"name": "dpo", "reference": reference}
    train = {"layout": "joint", "gradient_checkpointing": False}  # `split` differs by rounding
    config = config_of(tiny_sdxl, tmp_path, tmp_path, start, objective=objective, train=train)
    model = open_model(config)
    config = with_start(config, model.start, model.parts["unet"])
    parts = build_unet(config, model, FP64, CPU)
    engine = Engine(config, parts, build_loss(config.objective, 1000), FP64, CPU)
    inputs = make_inputs(model.config("unet"))
    known = engine.errors_of(start_of(parts.unet, config), inputs) if reference == "precomputed" else None
    out = engine.accumulate(inputs, 1.0, reference_errors=known)
    assert torch.equal(out.logits, torch.zeros_like(out.logits))

    merged = with_loras(open_sdxl(tiny_sdxl), [(start, 1.0)]).load_unet(torch.float64)
    torch.testing.assert_close(predicted(parts.unet, inputs), predicted(merged, inputs), rtol=0, atol=1e-10)


def test_the_reference_stays_when_the_factors_move(tiny_sdxl: Path, start: Path, tmp_path: Path) -> None:
    config = config_of(tiny_sdxl, tmp_path, tmp_path, start)
    model = open_model(config)
    config = with_start(config, model.start, model.parts["unet"])
    parts = build_unet(config, model, FP64, CPU)
    assert parts.start is not None
    inputs = make_inputs(model.config("unet"))
    before = parts.start.errors(inputs, FP64.context(CPU))
    trained = [p for p in parts.unet.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(RANKS)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    moved = [p.detach().clone() for p in trained]
    assert torch.equal(parts.start.errors(inputs, FP64.context(CPU)), before)
    assert all(torch.equal(p, m) for p, m in zip(trained, moved, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "speed",
    [
        pytest.param({"fused_ops": True}, id="fused operators"),
        pytest.param({"compile": True, "fused_ops": False}, id="compiled", marks=pytest.mark.proof),
    ],
)
def test_fast_operators_keep_the_reference(
    tiny_sdxl: Path,
    cache: Path,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speed: dict[str, Any],
) -> None:
    monkeypatch.setattr(compile_module, "BACKEND", "aot_eager")
    joint = {"layout": "joint", "gradient_checkpointing": False}
    config = config_of(tiny_sdxl, tmp_path, tmp_path, start, speed=speed, train=joint)
    model = open_model(config)
    config = with_start(config, model.start, model.parts["unet"])
    parts = build_unet(config, model, FP64, CPU)
    engine = Engine(config, parts, build_loss(config.objective, 1000), FP64, CPU)
    out = engine.accumulate(make_inputs(model.config("unet")), 1.0)
    assert torch.equal(out.logits, torch.zeros_like(out.logits))

    fit(config_of(tiny_sdxl, cache, tmp_path / "whole", start, speed=speed))
    half = config_of(tiny_sdxl, cache, tmp_path / "half", start, speed=speed, train={"steps": 4})
    fit(half)
    fit(half.model_copy(update={"train": half.train.model_copy(update={"steps": 6})}), resume=True)
    one, other = (load_file(tmp_path / run / "lora" / KOHYA) for run in ("whole", "half"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.slow
def test_a_resume_is_bit_identical_and_text_encoders_are_carried(
    tiny_sdxl: Path, cache: Path, start: Path, tmp_path: Path
) -> None:
    whole = config_of(tiny_sdxl, cache, tmp_path / "whole", start)
    fit(whole)
    half = config_of(tiny_sdxl, cache, tmp_path / "half", start, train={"steps": 4})
    fit(half)
    fit(half.model_copy(update={"train": half.train.model_copy(update={"steps": 6})}), resume=True)
    for name in ("lora_kohya.safetensors", "pytorch_lora_weights.safetensors"):
        one, other = (load_file(tmp_path / run / "lora" / name) for run in ("whole", "half"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())

        parts = open_sdxl(tiny_sdxl).parts
        began, ended = read_lora(start, parts), read_lora(tmp_path / "whole" / "lora" / name, parts)
        assert {n: layer.rank for n, layer in ended.parts["unet"].items()} == RANKS
        for component, layers in began.parts.items():
            for layer, factors in layers.items():
                found = ended.parts[component][layer]
                assert found.scale == pytest.approx(factors.scale)
                same = torch.equal(found.up.load(), factors.up.load())
                assert same == (component != "unet"), layer


def test_a_start_lora_leaves_the_latents_of_a_cache(tiny_sdxl: Path, start: Path, tmp_path: Path) -> None:
    cache, data = tmp_path / "cache", {"source": str(make_pairs(tmp_path / "pairs", 4))}
    prepare(make_config(tiny_sdxl, cache, tmp_path / "run", data=data))
    began = config_of(tiny_sdxl, cache, tmp_path / "run", start, data=data)
    with counting_images() as images:
        prepare(began)
    assert not images
    PairCache.open(cache).check(open_model(began), began.data)


def test_a_checkpoint_of_a_started_run_says_how_its_scales_are_kept(
    tiny_sdxl: Path, start: Path, tmp_path: Path
) -> None:
    text = about_checkpoint(config_of(tiny_sdxl, tmp_path, tmp_path / "run", start), 4)
    assert f"mapo-fast export {tmp_path / 'run'} --step 4 --to kohya" in text
    assert "set_adapters" not in text


def test_identities_count_the_start(tiny_sdxl: Path, start: Path, tmp_path: Path) -> None:
    model = open_model(config_of(tiny_sdxl, tmp_path, tmp_path, start))
    assert unet_identity(model) != unet_identity(open_sdxl(tiny_sdxl))
    assert encoders_identity(model) != encoders_identity(open_sdxl(tiny_sdxl))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"rank": 8}, "has 2, 3 and 4"),
        ({"alpha": 9.0}, "leave adapter.alpha out"),
        ({"targets": ["to_q"]}, "targets"),
    ],
)
def test_what_the_file_states_cannot_be_stated_otherwise(
    tiny_sdxl: Path, start: Path, tmp_path: Path, adapter: dict[str, Any], said: str
) -> None:
    config = config_of(tiny_sdxl, tmp_path, tmp_path, start, adapter=adapter)
    model = open_model(config)
    with pytest.raises(UserError, match=said):
        with_start(config, model.start, model.parts["unet"])


def test_a_full_fine_tune_has_no_lora_to_go_on_from(tiny_sdxl: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has none: use model"):
        config_of(tiny_sdxl, tmp_path, tmp_path, start, adapter={"kind": "full"})


def make_inputs(config: Any) -> PairInputs:
    """Two pairs for a UNet with this config, in fp64."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text, pooled = draw(2, 77, config["cross_attention_dim"]), draw(2, pooled_width(config))
    return PairInputs(
        noisy=draw(4, 4, 8, 8),
        timesteps=torch.tensor([3, 700, 3, 700]),
        prompt_embeds=torch.cat([text, text]),
        pooled_embeds=torch.cat([pooled, pooled]),
        time_ids=torch.full((4, 6), 64.0),
        target=draw(4, 4, 8, 8),
    )


@torch.no_grad()
def predicted(unet: Any, inputs: PairInputs) -> torch.Tensor:
    return predict(unet, inputs)


@pytest.mark.slow
def test_both_files_say_what_programs_show_and_nothing_private(
    tiny_sdxl: Path, cache: Path, start: Path, tmp_path: Path
) -> None:
    names = ("lora_kohya.safetensors", "pytorch_lora_weights.safetensors")
    config = config_of(
        tiny_sdxl, cache, tmp_path / "said", start, export={"title": "Mine", "trigger": "a word"}
    )
    fit(config)
    for name in names:
        said = read_header(tmp_path / "said" / "lora" / name).metadata
        assert said["ss_base_model_version"].startswith("sdxl_")  # else A1111 hides it
        assert (said["ss_steps"], said["ss_network_dim"], said["ss_network_alpha"]) == ("6", "4", "6.0")
        assert said["modelspec.title"] == "Mine"
        assert said["modelspec.trigger_phrase"] == "a word"
        assert said["modelspec.prediction_type"] == "epsilon"
        assert "/" not in "".join(v for k, v in said.items() if not k.startswith("modelspec."))
        assert "square" not in "".join(said.values())  # of the prompts

    silent = config_of(tiny_sdxl, cache, tmp_path / "silent", start, export={"metadata": False})
    fit(silent)
    kohya, diffusers = (read_header(tmp_path / "silent" / "lora" / name).metadata for name in names)
    assert kohya.keys() == {"format"}
    assert diffusers.keys() == {"format", "lora_adapter_metadata"}  # without it, its scale is another


@pytest.mark.slow
def test_the_memory_plan_counts_the_start_factors(tiny_sdxl: Path, start: Path, tmp_path: Path) -> None:
    device = {"device": "cuda", "layout": "joint", "gradient_checkpointing": False}
    config = config_of(tiny_sdxl, tmp_path, tmp_path, start, train=device)
    model = open_model(config)
    config = with_start(config, model.start, model.parts["unet"])
    without = config.model_copy(update={"adapter": config.adapter.model_copy(update={"start": None})})
    with_factors, none = (record_step(one, model.config("unet")) for one in (config, without))
    assert with_factors.trainable == none.trainable
    assert with_factors.peak - none.peak >= 4 * none.trainable
