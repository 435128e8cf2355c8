"""What `mapo-fast export` writes is the run's weights, rounded once, or the model's own, and nothing else."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from mapo_fast.models.identity import encoders_identity
from mapo_fast.models.open import open_sdxl
from mapo_fast.run.convert import convert
from mapo_fast.run.train import fit
from mapo_fast.settings.load import parse_config
from mapo_fast.util.console import Terminal
from mapo_fast.util.errors import UserError
from tests.files_of_models import edit_file, make_file
from tests.training import make_cache, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished full fine-tune that started from a single file."""
    folder = tmp_path_factory.mktemp("convert")
    model = make_file(tiny_sdxl, folder / "start.safetensors")
    cache = make_cache(tiny_sdxl, folder)
    table = settings(model, cache, folder / "run", train={"steps": 4}, export={"title": "Mine"})
    table["model"]["tokenizers"] = str(tiny_sdxl)
    assert fit(parse_config(table)).finished
    return folder / "run"


@pytest.fixture
def file(tiny_sdxl: Path, tmp_path: Path) -> Path:
    return make_file(tiny_sdxl, tmp_path / "start.safetensors")


def unet(path: Path, tokenizers: Path) -> dict[str, torch.Tensor]:
    return dict(open_sdxl(path, tokenizers=tokenizers).load_unet().state_dict())


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        convert(*args, **options)
    return str(caught.value)


def test_a_run_leaves_a_single_file(run: Path, tiny_sdxl: Path) -> None:
    trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    written = run / "model.safetensors"
    assert same(unet(written, tiny_sdxl), trained), "fp32, as the file that it started from"
    start = load_file(run.parent / "start.safetensors")
    rest = {key: value for key, value in load_file(written).items() if not key.startswith("model.")}
    assert rest
    assert all(torch.equal(value, start[key]) for key, value in rest.items()), "carried over"
    with safe_open(written, framework="pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Mine"


def test_the_result_is_exported(run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    convert(run, "single-file", out := tmp_path / "m.safetensors")
    assert out.read_bytes() == (run / "model.safetensors").read_bytes()
    convert(run, "single-file", half := tmp_path / "half.safetensors", dtype="bf16", with_metadata=False)
    trained = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_file(half)[key], trained["conv_in.weight"].bfloat16())
    with safe_open(half, framework="pt") as opened:
        assert opened.metadata() is None
    convert(run, "diffusers", folder := tmp_path / "folder")
    assert same(dict(open_sdxl(folder).load_unet().state_dict()), trained)


def test_a_checkpoint_is_exported(run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    convert(run, "single-file", out := tmp_path / "m.safetensors", step=2)
    saved = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    assert same(unet(out, tiny_sdxl), saved)
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "unet")
    convert(unfinished, "single-file", newest := tmp_path / "newest.safetensors")
    last = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    assert same(unet(newest, tiny_sdxl), last)
    assert "has no checkpoint of step 3; those that are there: 2, 4" in refusal(
        run, "single-file", out, step=3, force=True
    )
    (unfinished / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"cut")
    convert(unfinished, "single-file", newest, force=True)
    assert same(unet(newest, tiny_sdxl), saved), "the newest that is whole"
    assert "does not match its checksum" in refusal(unfinished, "single-file", newest, step=4, force=True)


def test_a_start_model_that_has_moved(run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.parent, moved)
    shutil.move(moved / "start.safetensors", tmp_path / "elsewhere.safetensors")
    text = (moved / "run" / "run.json").read_text()
    out = tmp_path / "m.safetensors"
    assert str(run.parent) in text
    convert(moved / "run", "single-file", out, base=tmp_path / "elsewhere.safetensors")
    assert out.read_bytes() == (run / "model.safetensors").read_bytes()
    assert "--base" in refusal(moved / "run", "single-file", out, base=tmp_path / "none", force=True)


def test_models_go_both_ways(tiny_sdxl: Path, file: Path, tmp_path: Path) -> None:
    convert(tiny_sdxl, "single-file", first := tmp_path / "first.safetensors", dtype="fp32")
    assert same(load_file(first), load_file(file))
    convert(tiny_sdxl, "diffusers", folder := tmp_path / "folder")
    for part in ("unet", "vae"):
        ours, theirs = (next((root / part).glob("*.safetensors")) for root in (folder, tiny_sdxl))
        assert same(load_file(ours), load_file(theirs))


def test_what_is_not_carried_over_is_said(tiny_sdxl: Path, file: Path, tmp_path: Path) -> None:
    def said(source: Path, name: str, dtype: str) -> str:
        out = io.StringIO()
        terminal = Terminal(Console(file=out, width=300))
        convert(source, "single-file", tmp_path / name, dtype=dtype, callbacks=terminal)
        return out.getvalue()

    assert "to bfloat16, not carried over bit by bit: VAE, first text" in said(file, "a.safetensors", "bf16")
    assert "converted to" not in said(file, "b.safetensors", "auto") + said(file, "c.safetensors", "fp32")
    assert "converted to" not in said(tiny_sdxl, "d.safetensors", "bf16")


def test_targets_that_are_refused(tiny_sdxl: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert "one of single-file, diffusers, kohya, peft" in refusal(file, "zip", out)
    assert "one of auto, fp16, bf16, fp32" in refusal(file, "single-file", out, dtype="int8")
    assert "must end in .safetensors" in refusal(file, "single-file", tmp_path / "m.ckpt")
    assert "not found" in refusal(tmp_path / "none", "single-file", out)
    assert "is not a run; leave it out" in refusal(file, "single-file", out, step=1)
    out.write_text("before")
    assert "replace it with --force" in refusal(file, "single-file", out)
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert "is the source itself" in refusal(file, "single-file", link)
    assert "is the source itself" in refusal(file, "single-file", file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "holds other things than a model" in refusal(file, "diffusers", other, force=True)
    folder = Path(shutil.copytree(other, tmp_path / "x.safetensors"))
    assert "is a folder" in refusal(file, "single-file", folder, force=True)
    copy = Path(shutil.copytree(tiny_sdxl, tmp_path / "a" / "model"))
    assert "holds the source" in refusal(copy, "diffusers", copy.parent, force=True)
    assert "is the source itself" in refusal(copy, "diffusers", copy, force=True)
    (link := tmp_path / "to-model").symlink_to(copy)
    assert "lies in the source" in refusal(copy, "single-file", link / "m.safetensors")
    assert "lies in the source" in refusal(link, "diffusers", copy / "unet" / "again", force=True)
    assert out.read_text() == "before"
    assert (other / "notes.txt").read_text() == "mine"


def test_a_source_may_be_replaced_by_force(file: Path, tiny_sdxl: Path) -> None:
    before = unet(file, tiny_sdxl)
    convert(file, "single-file", file, dtype="bf16", force=True)
    after = load_file(file)["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(after, before["conv_in.weight"].bfloat16())


def test_a_single_file_that_cannot_be_written_ends_no_run(
    run: Path, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mapo_fast.models import save

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    table = settings(tiny_sdxl, run.parent / "cache", tmp_path / "run", train={"steps": 1})
    result = fit(parse_config(table))
    assert result.finished
    assert not (tmp_path / "run" / "model.safetensors").exists()
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "model.safetensors was not written" in log


# LoRAs


@pytest.fixture(scope="module")
def lora_run(run: Path, tiny_sdxl: Path) -> Path:
    """A finished run of a LoRA whose alpha is not its rank."""
    adapter = {"kind": "lora", "rank": 2, "alpha": 6.0}
    table = settings(
        tiny_sdxl, run.parent / "cache", run.parent / "lora-run", train={"steps": 4}, adapter=adapter
    )
    assert fit(parse_config(table)).finished
    return run.parent / "lora-run"


def active(folder: Path, model: Path) -> dict[str, torch.Tensor]:
    """The UNet's weights with a run's LoRA, as peft's own merge gives them in fp64."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float64)
    pipeline.load_lora_weights(folder / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return dict(pipeline.unet.state_dict())


def test_a_run_of_a_lora_is_merged_exactly(lora_run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    convert(lora_run, "diffusers", whole := tmp_path / "whole", merge=1.0)
    convert(lora_run, "single-file", half := tmp_path / "half.safetensors", merge=1.0, dtype="bf16")
    expected, start = active(lora_run, tiny_sdxl), open_sdxl(tiny_sdxl).load_unet().state_dict()
    got = open_sdxl(whole).load_unet().state_dict()
    rounded = open_sdxl(half, tokenizers=tiny_sdxl).load_unet().state_dict()
    assert got.keys() == expected.keys()
    assert any(not torch.equal(got[name], start[name]) for name in got)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight.float(), rtol=2e-7, atol=1e-12)
        torch.testing.assert_close(rounded[name], weight.bfloat16().float(), rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_lora_goes_through_other_layouts(
    lora_run: Path, tiny_sdxl: Path, tmp_path: Path, form: str
) -> None:
    there = tmp_path / ("there.safetensors" if form == "kohya" else "there")
    convert(lora_run / "lora" / "pytorch_lora_weights.safetensors", form, there, base=tiny_sdxl)
    convert(there, "kohya", back := tmp_path / "back.safetensors", base=tiny_sdxl)
    assert same(load_file(back), load_file(lora_run / "lora" / "lora_kohya.safetensors"))


def test_a_checkpoint_of_a_lora_has_its_alpha(lora_run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    convert(lora_run, "kohya", out := tmp_path / "step.safetensors", step=4)
    assert same(load_file(out), load_file(lora_run / "lora" / "lora_kohya.safetensors"))


def test_peft_reads_its_folder(lora_run: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    convert(lora_run, "peft", folder := tmp_path / "peft")
    merged = PeftModel.from_pretrained(
        open_sdxl(tiny_sdxl).load_unet(torch.float64), folder
    ).merge_and_unload()
    expected = active(lora_run, tiny_sdxl)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-10)


def test_what_is_asked_of_a_lora_and_cannot_be(
    lora_run: Path, tiny_sdxl: Path, file: Path, tmp_path: Path
) -> None:
    lora, out = lora_run / "lora" / "lora_kohya.safetensors", tmp_path / "m.safetensors"
    assert "is a LoRA; --merge 1.0 adds it" in refusal(lora_run, "single-file", out)
    assert "is a whole model, not a LoRA" in refusal(file, "kohya", out)
    assert "is not a LoRA; leave it out" in refusal(file, "single-file", out, merge=1.0)
    assert "writes a whole model" in refusal(lora_run, "kohya", out, merge=1.0)
    assert "written as they are" in refusal(lora_run, "kohya", out, dtype="bf16")
    assert "write a weight" in refusal(lora_run, "single-file", out, merge=float("nan"))
    v = tmp_path / "v"
    shutil.copytree(tiny_sdxl, v)
    scheduler = v / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    from safetensors.torch import save_file

    save_file(
        load_file(lora),
        said := tmp_path / "said.safetensors",
        metadata={"modelspec.prediction_type": "epsilon"},
    )
    assert "is for epsilon by its metadata" in refusal(said, "single-file", out, base=v, merge=1.0)
    assert not out.exists()


# The card


def test_a_run_leaves_a_card(run: Path, lora_run: Path) -> None:
    import yaml

    for folder, what in ((run, "full fine-tune"), (lora_run, "LoRA")):
        front, body = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
        stated = yaml.safe_load(front)
        assert stated["pipeline_tag"] == "text-to-image"
        assert "mapo" in stated["tags"]
        assert "license" not in stated
        assert what in body
        assert "pairs, held out" in body
        assert "| preference accuracy | " in body
        assert str(folder.parent) not in body, "no paths"
    assert "# Mine" in (run / "README.md").read_text()


def test_a_card_takes_licence_and_base_from_the_start_model_and_prompts_as_text(
    run: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    import yaml

    evil = 'a: "b"\n---\n<script>'
    start = edit_file(
        Path(shutil.copy(run.parent / "start.safetensors", tmp_path / "s.safetensors")),
        lambda tensors: None,
        **{"modelspec.license": evil, "modelspec.title": "Base"},
    )
    table = settings(
        start, run.parent / "cache", tmp_path / "run", train={"steps": 1}, export={"prompts": True}
    )
    table["model"]["tokenizers"] = str(tiny_sdxl)
    table["preview"] = {"prompts": ["<b>red|blue</b>"], "steps": 1}
    assert fit(parse_config(table)).finished
    front, body = (tmp_path / "run" / "README.md").read_text().removeprefix("---\n").split("\n---\n\n", 1)
    assert yaml.safe_load(front)["license"] == evil
    assert yaml.safe_load(front)["base_model"] == "Base"
    assert "<b>" not in body
    assert "&lt;b&gt;red\\|blue" in body
    assert "previews/step-00000001/00-b-red-blue-b.png" in body


def test_tokenizers_of_a_file_with_another_vocabulary_are_named(
    file: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pipeline"
    assert "tokenizer" in refusal(file, "diffusers", out)
    assert not out.exists()
    convert(file, "diffusers", out, tokenizers=tiny_sdxl)
    assert encoders_identity(open_sdxl(out)) == encoders_identity(open_sdxl(tiny_sdxl))
    assert "no tokenizers; leave it out" in refusal(
        file, "single-file", tmp_path / "x.safetensors", tokenizers=tiny_sdxl
    )
    assert "model.tokenizers not found" in refusal(
        file, "diffusers", tmp_path / "y", tokenizers=tmp_path / "no"
    )


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
def test_a_link_to_nothing_is_not_replaced(file: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    assert "exists: name another" in refusal(file, "single-file", link)
    assert link.is_symlink()
