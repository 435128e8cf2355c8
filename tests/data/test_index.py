"""What a cache is made for, and whether it is finished and whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_fast.data import prepare as prepare_module
from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.models.identity import files_fingerprint, joint_identity
from mapo_fast.models.open import open_model, open_sdxl
from mapo_fast.models.sdxl import ENCODERS
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorfile import write_tensors
from tests.data.pair_sources import (
    config,
    contents,
    jsonl_folder,
    skipped,
    write_jsonl,
)
from tests.data.preparing import counting_images, said
from tests.tiny import TEXT_WIDTH


def test_check_accepts_its_own_model_and_settings(tiny_sdxl: Path, prepared: Path) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", prepared)
    PairCache.open(prepared).check(open_sdxl(tiny_sdxl), run.data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resolution": 64}, "was made for data.resolution = 32, the config says 64"),
        ({"bucket_step": 16}, "was made for data.bucket_step = 8, the config says 16"),
        ({"max_tokens": 150}, "was made for data.max_tokens = 77, the config says 150"),
        ({"flip": True}, "was made for data.flip = False, the config says True"),
        ({"size_conditioning": "own"}, "data.size_conditioning = shared, the config says own"),
        ({"vae_dtype": "bf16"}, "data.vae_dtype = fp32, the config says bf16"),
        ({"vae_tiling": True}, "data.vae_tiling = False, the config says True"),
        ({"max_crop": 0.1}, "data.max_crop = 0.2, the config says 0.1"),
    ],
)
def test_cache_of_other_settings_is_refused(
    tiny_sdxl: Path, prepared: Path, change: dict[str, Any], text: str
) -> None:
    before = contents(prepared)
    run = config(tiny_sdxl, prepared.parent / "s", prepared, **change)
    with pytest.raises(UserError) as error:
        prepare(run)
    assert text in str(error.value)
    assert "nothing was changed" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(prepared) == before
    with pytest.raises(UserError, match=r"run mapo-fast prepare again with another data\.cache") as error:
        PairCache.open(prepared).check(open_sdxl(tiny_sdxl), run.data)
    assert text in str(error.value)


def test_cache_of_another_vae_is_refused(prepared: Path, other_model: Callable[[str], Path]) -> None:
    model = other_model("vae")
    run = config(model, prepared.parent / "s", prepared)
    with pytest.raises(UserError, match="another VAE, text encoder or tokenizer"):
        prepare(run)
    with pytest.raises(UserError, match="another VAE, text encoder or tokenizer"):
        PairCache.open(prepared).check(open_sdxl(model), run.data)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_other_text_encoders_have_only_prompts_encoded_again(
    prepared: Path, copy: Path, other_model: Callable[[str], Path], part: str
) -> None:
    source, model = prepared.parent / "s", other_model(part)
    run = config(model, source, copy)
    with pytest.raises(UserError, match=r"run mapo-fast prepare again \(no image is encoded twice\)"):
        PairCache.open(copy).check(open_sdxl(model), run.data)
    with counting_images() as images:
        _, text = said(run)
    assert not images
    assert "its prompts are encoded again, its latents stay" in text
    PairCache.open(copy).check(open_sdxl(model), run.data)
    prepare(config(model, source, copy.with_name("fresh")))
    assert contents(copy) == contents(copy.with_name("fresh"))


def test_a_kill_while_text_is_replaced_mixes_no_encoders(
    tiny_sdxl: Path,
    prepared: Path,
    copy: Path,
    other_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = prepared.parent / "s"
    other = config(other_model("text_encoder"), source, copy)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(other)
    with counting_images() as images:
        prepare(config(tiny_sdxl, source, copy))
    assert not images
    assert contents(copy) == contents(prepared)


def test_cache_of_a_pipeline_with_another_empty_prompt_is_refused(
    tiny_sdxl: Path, tmp_path: Path, prepared: Path
) -> None:
    model = shutil.copytree(tiny_sdxl, tmp_path / "m")
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": False}))
    run = config(model, prepared.parent / "s", prepared)
    with pytest.raises(UserError, match=r"force_zeros_for_empty_prompt = True, model_index\.json .* False:"):
        PairCache.open(prepared).check(open_sdxl(model), run.data)


def test_another_unet_may_use_the_cache(prepared: Path, other_model: Callable[[str], Path]) -> None:
    model = other_model("unet")
    PairCache.open(prepared).check(open_sdxl(model), config(model, prepared.parent / "s", prepared).data)


def test_folder_with_other_files_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="already holds something else"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))
    assert contents(tmp_path / "c") == {"thesis.txt": b"precious"}
    with pytest.raises(UserError, match="already holds something else"):
        prepare(config(tiny_sdxl, source, tmp_path / "c" / "thesis.txt"))


def test_a_run_s_folder_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    """It has a `settings.json` as a cache has."""
    source = jsonl_folder(tmp_path / "s", 3)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", "run.json", "settings.json"):
        (run / name).write_text("{}")
    before = contents(run)
    with pytest.raises(UserError, match="already holds something else"):
        prepare(config(tiny_sdxl, source, run))
    assert contents(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"max_crop": 0.9}, {"resolution": 64}, {"vae_dtype": "bf16"}])
def test_a_refused_prepare_leaves_the_cache_free(
    tiny_sdxl: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    write_jsonl(source, (source / "pairs.jsonl").read_text().splitlines() + ["{"] * 3)
    with pytest.raises(UserError, match="3 × bad line"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))
    run = config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5, **change)
    assert prepare(run).pairs == 4
    assert PairCache.open(tmp_path / "c").check(open_sdxl(tiny_sdxl), run.data) is None


@pytest.mark.parametrize(
    ("remove", "text"),
    [(("index.json",), "is unfinished"), (("index.json", "settings.json"), "is not a mapo")],
)
def test_unfinished_cache(copy: Path, remove: tuple[str, ...], text: str) -> None:
    for name in remove:
        (copy / name).unlink()
    with pytest.raises(UserError, match=text):
        PairCache.open(copy)


def test_missing_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a mapo_fast cache: run mapo-fast prepare"):
        PairCache.open(tmp_path / "nowhere")


def test_damaged_index_and_other_format(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["settings"]["format"] = 99
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cache format 99"):
        PairCache.open(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        PairCache.open(copy)


def edited(index: dict[str, Any], kind: str) -> Any:
    if kind == "train":
        return index | {"train": index["train"] - 1}
    if kind == "settings":
        return index | {"settings": index["settings"] | {"flip": True}}
    if kind == "list":
        return [index]
    return {name: value for name, value in index.items() if name != kind}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "settings", "list", "files", "sha256", "summary"])
def test_edited_index_is_refused(tiny_sdxl: Path, prepared: Path, copy: Path, kind: str) -> None:
    path = copy / "index.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), kind)))
    before = contents(copy)
    for use in (
        lambda: PairCache.open(copy),
        lambda: prepare(config(tiny_sdxl, prepared.parent / "s", copy)),
    ):
        with pytest.raises(UserError, match=r"index\.json is damaged \([^\n]+\): delete it and run") as error:
            use()
        assert "\n" not in str(error.value)
    assert contents(copy) == before
    path.unlink()
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


def test_fingerprint_is_of_the_content(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    first = PairCache.open(prepared).fingerprint
    assert PairCache.open(copy).fingerprint == first, "not of the place"
    prepare(config(tiny_sdxl, prepared.parent / "s", copy, held_out=0.5))
    assert PairCache.open(copy).fingerprint != first


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def as_format(cache: Path, number: int, model: Path) -> None:
    """Turn a cache into what the version with this format wrote."""
    opened = open_sdxl(model)
    known = joint_identity(opened) if number == 4 else files_fingerprint(opened, ENCODERS)
    for name in ("index.json", "settings.json"):
        text = json.loads((cache / name).read_text())
        settings = text["settings"] if name == "index.json" else text
        settings |= {"format": number, "model": known}
        del settings["vae"], settings["text"]
        (cache / name).write_text(json.dumps(text))
    (cache / "pairs.npy").write_bytes(b"as that format had it")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "interrupted"), [(2, False), (3, True), (4, True)])
def test_an_earlier_format_is_taken_over_without_encoding(
    tiny_sdxl: Path,
    prepared: Path,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    interrupted: bool,
) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", copy)
    as_format(copy, number, tiny_sdxl)
    index = json.loads((copy / "index.json").read_text())
    known = {name: index[name] for name in ("settings", "train", "files")}  # as runs of then know it
    before = {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()}
    if interrupted:  # when its settings are those of this format already, its index is not
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "scan", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(run)
        assert json.loads((copy / "settings.json").read_text())["format"] == 5
    with pytest.raises(UserError, match="of an earlier version whose latents can be kept: run mapo-fast"):
        PairCache.open(copy)
    prepare(run)
    assert {path: path.stat().st_mtime_ns for path in (copy / "shards").iterdir()} == before
    have, want = contents(copy), contents(prepared)
    assert have.keys() == want.keys()
    assert {name for name in have if have[name] != want[name]} == {"index.json", "settings.json"}
    cache = PairCache.open(copy)
    cache.check(open_sdxl(tiny_sdxl), run.data)
    assert cache.fingerprint == hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    before_again = contents(copy)
    prepare(run)
    assert contents(copy) == before_again


@pytest.mark.parametrize("number", [3, 4])
def test_an_earlier_format_keeps_its_latents_for_a_lora_of_text_encoders(
    tiny_sdxl: Path, prepared: Path, copy: Path, tmp_path: Path, number: int
) -> None:
    as_format(copy, number, tiny_sdxl)
    key, width = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", TEXT_WIDTH
    factors = {f"{key}.lora_down.weight": torch.ones(1, width), f"{key}.lora_up.weight": torch.ones(width, 1)}
    save_file(factors, lora := tmp_path / "text.safetensors")
    run = config(tiny_sdxl, prepared.parent / "s", copy)
    run = run.model_copy(update={"model": run.model.model_copy(update={"lora": (str(lora),)})})
    with counting_images() as images:
        _, text = said(run)
    assert "its prompts are encoded again, its latents stay" in text
    assert not images
    PairCache.open(copy).check(open_model(run), run.data)
    have, want = contents(copy), contents(prepared)
    changed = {name for name in have if name.startswith("shards/") and have[name] != want[name]}
    assert changed
    assert all(name.startswith("shards/text") for name in changed)


@pytest.mark.parametrize("number", [3, 4])
def test_an_earlier_format_of_another_model_is_refused(
    tiny_sdxl: Path, prepared: Path, copy: Path, other_model: Callable[[str], Path], number: int
) -> None:
    as_format(copy, number, other_model("text_encoder_2"))
    with pytest.raises(UserError, match="made with another VAE, text encoder or tokenizer"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


def test_embeddings_of_an_earlier_format_that_are_not_finite_are_listed(
    tiny_sdxl: Path, prepared: Path, copy: Path
) -> None:
    as_format(copy, 3, tiny_sdxl)
    path = copy / "shards" / "text2-00001.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["pooled"][2, 5] = torch.nan
    tensors["hidden"][4, 3, 1] = torch.inf
    path.with_suffix(".sha256").write_text(
        f"{write_tensors(path, tensors, {'nan_retries': '0'})}  {path.name}\n"
    )
    summary = prepare(config(tiny_sdxl, prepared.parent / "s", copy, max_skipped=0.5))
    assert (summary.pairs, summary.skipped) == (10, {"non-finite embedding": 2})
    assert set(skipped(copy).values()) == {"non-finite embedding"}
    cache = PairCache.open(copy)
    batch = cache.batch([*cache.train], flip=None, drop=None)
    assert batch.prompt_embeds.isfinite().all()
    assert batch.pooled_embeds.isfinite().all()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
def test_an_index_that_is_no_file_is_named(prepared: Path, tmp_path: Path) -> None:
    """Without waiting for a writer."""
    cache = shutil.copytree(prepared, tmp_path / "c")
    (cache / "index.json").unlink()
    os.mkfifo(cache / "index.json")
    with pytest.raises(UserError, match=r"data\.cache .* cannot be read: it is a FIFO"):
        PairCache.open(cache)
