import errno
import io
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mapo_fast.data import latents, scan, shards
from mapo_fast.data import prepare as prepare_module
from mapo_fast.data.buckets import fit_image
from mapo_fast.data.cache import PairCache
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.prepare import prepare
from mapo_fast.models.pipeline import PipelineFolder, open_sdxl
from mapo_fast.models.text import empty_prompt, encode_prompts
from mapo_fast.util.console import Terminal
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    contents,
    encoded,
    jsonl_folder,
    pickapic_rows,
    picture,
    png,
    skipped,
    write_jsonl,
    write_parquet,
)
from tests.tiny import make_tiny_sdxl


def said(run: Any) -> tuple[Any, str]:
    """Result of prepare and what it printed."""
    out = io.StringIO()
    result = prepare(run, callbacks=Terminal(Console(file=out, width=200)))
    return result, out.getvalue()


def one_pair(folder: Path, chosen: bytes, rejected: bytes, prompt: str = "a red cat") -> Path:
    write_jsonl(folder, [{"prompt": prompt, "chosen": "w", "rejected": "l"}])
    (folder / "w").write_bytes(chosen)
    (folder / "l").write_bytes(rejected)
    return folder


def reference_latents(model: Path, data: bytes, bucket: tuple[int, int]) -> torch.Tensor:
    """What diffusers' own image processor and VAE make of an image."""
    from diffusers.image_processor import VaeImageProcessor

    vae = open_sdxl(model).load_vae(torch.float32)
    pixels = VaeImageProcessor(vae_scale_factor=4).preprocess(fit_image(decode_image(data), bucket))
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode()[0] * vae.config.scaling_factor


def test_batch_equals_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1), png(2))
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    prepare(run)
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    for got, seed in ((batch.chosen_latents, 1), (batch.rejected_latents, 2)):
        expected = reference_latents(tiny_sdxl, png(seed), (32, 32))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-6)
    text = encode_prompts(
        open_sdxl(tiny_sdxl), ["a red cat"], max_tokens=77, device="cpu", dtype=torch.float32
    )
    assert torch.equal(batch.prompt_embeds, text.prompt_embeds.half().float())
    assert torch.equal(batch.pooled_embeds, text.pooled_embeds.half().float())
    assert batch.time_ids_chosen.dtype == torch.float32
    assert batch.time_ids_chosen.tolist() == [[32, 32, 0, 0, 32, 32]]
    dropped = cache.batch(cache.train, flip=None, drop=[True])
    assert not dropped.prompt_embeds.any()
    assert not dropped.pooled_embeds.any()


def test_flip_stores_mirrored_latents(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1), png(2))
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, flip=True))
    cache = PairCache.open(tmp_path / "c")
    assert cache.flips
    plain, mirrored = (cache.batch(cache.train, flip=[f], drop=None) for f in (False, True))
    mirror = encoded(decode_image(png(1)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for got, data in ((plain, png(1)), (mirrored, mirror)):
        expected = reference_latents(tiny_sdxl, data, (32, 32))
        torch.testing.assert_close(got.chosen_latents[0], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.rejected_latents, mirrored.rejected_latents)


def test_every_layout_gives_the_same_pairs(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = pickapic_rows(3)
    write_parquet(tmp_path / "parquet" / "a.parquet", rows)
    twin, table = tmp_path / "twin", []
    for i, row in enumerate(rows):
        best, worst = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        for name, column in (("chosen", best), ("rejected", worst)):
            (twin / name).mkdir(parents=True, exist_ok=True)
            (twin / name / f"{i}.png").write_bytes(row[column])
        (twin / "chosen" / f"{i}.txt").write_text(row["caption"])
        table.append({"prompt": row["caption"], "chosen": f"chosen/{i}.png", "rejected": f"rejected/{i}.png"})
    ids = []
    for number, source in enumerate(("parquet", "twin", "twin")):
        if number == 2:
            write_jsonl(twin, table)
        cache = tmp_path / f"c{number}"
        prepare(config(tiny_sdxl, tmp_path / source, cache, held_out=0.0))
        ids.append([pair.id for pair in PairCache.open(cache).train])
    assert len(set(ids[0])) == 3
    assert ids[0] == ids[1] == ids[2]


def test_each_distinct_prompt_and_image_is_stored_once(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "s"
    for name in "abc":
        source.mkdir(exist_ok=True)
        (source / f"{name}.png").write_bytes(png(ord(name)))
    (source / "copy.png").write_bytes(png(ord("a")))
    row = {"prompt": "red", "chosen": "a.png", "rejected": "b.png"}
    write_jsonl(
        source,
        [row, row, row | {"chosen": "copy.png"}, row | {"rejected": "c.png"}, row | {"prompt": "blue"}],
    )
    count = 0
    start = latents.LatentEncoder.start

    def counted(self: Any, images: Any) -> Any:
        nonlocal count
        count += len(images)
        return start(self, images)

    monkeypatch.setattr(latents.LatentEncoder, "start", counted)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.pairs, summary.images, summary.prompts, summary.duplicates) == (3, 3, 2, 2)
    assert count == 3


def test_contradicting_rows_are_both_skipped(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    write_jsonl(source, rows)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=1.0))
    assert summary.pairs == 3
    assert skipped(tmp_path / "c") == {"pairs.jsonl:1": "contradiction", "pairs.jsonl:5": "contradiction"}


def test_every_bad_row_is_listed_with_its_reason(tiny_sdxl: Path, tmp_path: Path) -> None:
    bad = {
        "zero-byte image": b"",
        "unreadable image": b"no image",
        "truncated image": png(1, 64, 64)[:5000],
        "unsupported pixel format": encoded(Image.new("F", (32, 32)), "TIFF"),
        "too much crop": png(3, 16, 400),
        "identical images": png(0),
    }
    ok = pickapic_rows(1)[0]
    rows = [ok, *(ok | {"jpg_0": png(0), "jpg_1": data} for data in bad.values())]
    rows += [ok | {"label_0": 0.5, "label_1": 0.5}, ok | {"has_label": False}, ok | {"caption": ""}]
    rows += [ok | {"jpg_1": None}]
    source = write_parquet(tmp_path / "a.parquet", rows)
    summary, text = said(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.95))
    expected = [*bad, "tie", "no label", "empty caption", "missing image"]
    assert skipped(tmp_path / "c") == {f"a.parquet:{i}": reason for i, reason in enumerate(expected, start=1)}
    assert summary.pairs == 1
    assert summary.skipped == dict.fromkeys(sorted(expected), 1)
    for reason in expected:
        assert f"1 × {reason}" in text


def test_too_many_skipped_stops_before_encoding(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = [*pickapic_rows(7), *pickapic_rows(2, label_0=0.5, label_1=0.5), *pickapic_rows(1, caption="")]
    source = write_parquet(tmp_path / "a.parquet", rows)
    cache = tmp_path / "c"
    with pytest.raises(UserError) as error:
        prepare(config(tiny_sdxl, source, cache, max_skipped=0.29))
    text = str(error.value)
    assert "30% of 10 rows" in text
    assert "2 × tie" in text
    assert "1 × empty caption" in text
    assert str(cache / "skipped.jsonl") in text
    assert len(skipped(cache)) == 3
    assert not list((cache / "shards").iterdir())
    assert prepare(config(tiny_sdxl, source, cache, max_skipped=0.3)).pairs == 7, "the limit may be raised"


def test_nothing_usable(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pickapic_rows(2, label_0=0.5, label_1=0.5))
    with pytest.raises(UserError, match=r"no usable pair \(2 × tie\)"):
        prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=1.0))


def test_one_bucket_per_pair_and_upscaled_counted(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1, 64, 32), png(2, 24, 14))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, size_conditioning="own"))
    cache = PairCache.open(tmp_path / "c")
    height, width = cache.train[0].bucket
    assert height > width
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert batch.chosen_latents.shape == batch.rejected_latents.shape == (1, 4, height // 4, width // 4)
    assert summary.upscaled == 1
    assert batch.time_ids_chosen[0, :2].tolist() == [64, 32]
    assert batch.time_ids_rejected[0, :2].tolist() == [24, 14]
    assert batch.time_ids_rejected[0, 4:].tolist() == [height, width]


def test_shared_conditioning_gives_both_images_the_same_ids(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1, 64, 32), png(2, 24, 14))
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert torch.equal(batch.time_ids_chosen, batch.time_ids_rejected)


def test_size_that_predicts_the_label_is_warned_about(tiny_sdxl: Path, tmp_path: Path) -> None:
    rows = [row | {"jpg_0": png(i, 32), "jpg_1": png(i, 64, 64)} for i, row in enumerate(pickapic_rows(6))]
    rows = [row | {"label_0": 1.0, "label_1": 0.0} for row in rows]
    source = write_parquet(tmp_path / "a.parquet", rows)
    summary, text = said(config(tiny_sdxl, source, tmp_path / "c"))
    assert [w for w in summary.warnings if "image size alone predicts the label (AUC 0.00" in w]
    assert "warning: image size alone predicts the label" in text
    again, _ = said(config(tiny_sdxl, source, tmp_path / "c"))
    assert again.warnings == summary.warnings


def test_truncated_prompts_are_listed(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = one_pair(tmp_path / "s", png(1), png(2), prompt="x" * 80)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert summary.truncated == 1
    row = json.loads((tmp_path / "c" / "truncated.jsonl").read_text())
    assert row == {"prompt": "x" * 80, "tokens": 80, "kept": 75, "cut": "x" * 5}


@pytest.mark.parametrize(("max_tokens", "sequence"), [(150, 154), (225, 231)])
def test_long_prompts(tiny_sdxl: Path, tmp_path: Path, max_tokens: int, sequence: int) -> None:
    source = jsonl_folder(tmp_path / "s", 2)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(source, [rows[0], rows[1] | {"prompt": "x" * 140}])
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, max_tokens=max_tokens))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=[True, False])
    assert batch.prompt_embeds.shape == (2, sequence, 40)
    assert summary.truncated == 0


class Overflowing:
    """A VAE that gives NaN for images whose first pixel is white, in bf16 or in any precision."""

    def __init__(self, vae: Any, always: bool) -> None:
        self.vae, self.always, self.dtype = vae, always, vae.dtype

    def to(self, device: torch.device) -> "Overflowing":
        return self

    def encode(self, pixels: torch.Tensor) -> Any:
        out = self.vae.encode(pixels)
        if self.always or self.dtype is torch.bfloat16:
            white = (pixels[:, :, 0, 0] == 1.0).all(1)
            out.latent_dist.mean[white] = torch.nan
        return out


def overflow(monkeypatch: pytest.MonkeyPatch, *, always: bool) -> None:
    load = PipelineFolder.load_vae
    monkeypatch.setattr(
        PipelineFolder, "load_vae", lambda self, dtype=torch.float32: Overflowing(load(self, dtype), always)
    )


def white_corner(seed: int) -> bytes:
    image = picture(seed)
    image.putpixel((0, 0), (255, 255, 255))
    return encoded(image)


def test_nan_latents_are_retried_in_fp32(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, always=False)
    source = one_pair(tmp_path / "s", white_corner(1), png(2))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0, vae_dtype="bf16"))
    assert summary.nan_retries == 1
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    monkeypatch.undo()
    assert batch.chosen_latents.dtype == torch.bfloat16
    expected = reference_latents(tiny_sdxl, white_corner(1), (32, 32))
    assert torch.equal(batch.chosen_latents[0], expected.bfloat16()), "the retry ran in fp32"


def test_latents_that_stay_nan_are_skipped_and_listed(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, always=True)
    source = jsonl_folder(tmp_path / "s", 6)
    (source / "3l.png").write_bytes(white_corner(1))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", vae_dtype="bf16"))
    assert (summary.pairs, summary.nan_retries) == (5, 1)
    assert skipped(tmp_path / "c") == {"pairs.jsonl:4": "non-finite latent"}
    with pytest.raises(UserError, match="1 × non-finite latent"):
        prepare(config(tiny_sdxl, source, tmp_path / "d", vae_dtype="bf16", max_skipped=0.1))
    assert list((tmp_path / "d" / "shards").glob("latents-*")), "what is encoded is kept"


def nan_for(monkeypatch: pytest.MonkeyPatch, word: str, which: int) -> None:
    """One encoder gives NaN for prompts with a word in them."""
    call = prepare_module.TextEncoder.__call__

    def damaged(self: Any, prompts: Any) -> Any:
        hidden, pooled = call(self, prompts)
        if self.which == which:
            (pooled if which == 2 else hidden)[[word in prompt for prompt in prompts]] = torch.nan
        return hidden, pooled

    monkeypatch.setattr(prepare_module.TextEncoder, "__call__", damaged)


@pytest.mark.parametrize("which", [1, 2])
def test_prompts_whose_embeddings_are_not_finite_are_listed(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    nan_for(monkeypatch, "thing 3", which)
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    summary = prepare(run)
    assert summary.skipped == {"non-finite embedding": 1}
    assert skipped(tmp_path / "c") == {"pairs.jsonl:4": "non-finite embedding"}
    assert (summary.pairs, summary.images) == (5, 10)
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=None)
    assert batch.prompt_embeds.isfinite().all()
    assert batch.prompt_embeds.abs().max() < 65504
    assert batch.pooled_embeds.isfinite().all()
    with pytest.raises(UserError, match="1 × non-finite embedding"):
        prepare(config(tiny_sdxl, source, tmp_path / "d", max_skipped=0.1))
    assert not list((tmp_path / "d" / "shards").glob("latents-*")), "known before images are encoded"
    (tmp_path / "c" / "index.json").unlink()
    monkeypatch.setattr(PipelineFolder, "load_text_encoder", None)
    assert prepare(run).skipped == summary.skipped, "known without encoding again"


def test_an_empty_prompt_that_is_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_sdxl(tmp_path / "m", force_zeros=False)
    nan_for(monkeypatch, "", 2)
    with pytest.raises(UserError, match=r"text_encoder_2 gives values for the empty prompt that are not"):
        prepare(config(model, jsonl_folder(tmp_path / "s", 3), tmp_path / "c"))
    monkeypatch.undo()
    assert prepare(config(model, tmp_path / "s", tmp_path / "c")).pairs == 3


def test_embeddings_too_large_for_fp16_are_kept_in_fp32(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = prepare_module.TextEncoder.__call__

    def large(self: Any, prompts: Any) -> Any:
        hidden, pooled = call(self, prompts)
        return hidden * 1e6, pooled

    monkeypatch.setattr(prepare_module.TextEncoder, "__call__", large)
    source = one_pair(tmp_path / "s", png(1), png(2))
    prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    embeds = cache.batch(cache.train, flip=None, drop=None).prompt_embeds
    assert embeds.isfinite().all()
    assert embeds.abs().max() > 1e6


@pytest.mark.parametrize("kind", ["latents_mean", "shift_factor"])
def test_vae_with_other_latent_statistics(tiny_sdxl: Path, tmp_path: Path, kind: str) -> None:
    import shutil

    vae = tmp_path / "vae"
    shutil.copytree(tiny_sdxl / "vae", vae)
    settings = json.loads((vae / "config.json").read_text())
    new = {"shift_factor": 0.1} if kind == "shift_factor" else {}
    mean, std = [0.1, 0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    (vae / "config.json").write_text(json.dumps(settings | new | {"latents_mean": mean, "latents_std": std}))
    source = one_pair(tmp_path / "s", png(1), png(2))
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    run = run.model_copy(update={"model": run.model.model_copy(update={"vae": vae})})
    if kind == "shift_factor":
        with pytest.raises(UserError, match=r"shift_factor = 0\.1"):
            prepare(run)
        return
    prepare(run)
    cache = PairCache.open(tmp_path / "c")
    got = cache.batch(cache.train, flip=None, drop=None).chosen_latents[0]
    scale = settings["scaling_factor"]
    plain = reference_latents(tiny_sdxl, png(1), (32, 32)) / scale
    shift, spread = (torch.tensor(v).view(4, 1, 1) for v in (mean, std))
    torch.testing.assert_close(got, (plain - shift) / spread * scale, rtol=1e-4, atol=1e-5)


def test_bucket_step_must_fit_the_vae(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PipelineFolder, "config", lambda self, part: {"block_out_channels": [1] * 5, "latent_channels": 4}
    )
    with pytest.raises(UserError, match=r"set data\.bucket_step to a multiple of 16"):
        latents.latent_shape(open_folder(tiny_sdxl), (40, 24))


def open_folder(path: Path) -> PipelineFolder:
    return PipelineFolder(path, path / "vae")


# Disk


def test_disk_need_is_printed_first(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    _, text = said(config(tiny_sdxl, source, tmp_path / "c"))
    need = text.index("disk need: ")
    assert "20 images" in text[need:]
    assert "10 prompts" in text[need:]
    assert need < text.index("images ━")


def test_too_little_disk_space_stops_before_encoding(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    source = jsonl_folder(tmp_path / "s", 4)
    with pytest.raises(UserError, match=r"needs \d+ kB more in .*, only 1 kB are free"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))
    assert not list((tmp_path / "c" / "shards").iterdir())


def test_disk_full_while_writing(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any, metadata: Any) -> str:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    source = jsonl_folder(tmp_path / "s", 4)
    run = config(tiny_sdxl, source, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", full)
        with pytest.raises(UserError, match=r"cannot write .*-00000.*: the disk is full"):
            prepare(run)
    assert not list((tmp_path / "c" / "shards").iterdir())
    assert prepare(run).pairs == 4


# Running again


def test_finished_cache_is_left_alone(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    first = prepare(run)
    before = contents(tmp_path / "c")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    again, text = said(run)
    assert "complete already: 6 pairs, nothing to do" in text
    assert contents(tmp_path / "c") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == times
    assert again.seconds < first.seconds
    assert again.__dict__ | {"seconds": 0} == first.__dict__ | {"seconds": 0}


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


def test_cache_of_another_model_is_refused(prepared: Path, other_model: Callable[[str], Path]) -> None:
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer_2"):
        model = other_model(part)
        run = config(model, prepared.parent / "s", prepared)
        with pytest.raises(UserError, match="another VAE, text encoder or tokenizer"):
            prepare(run)
        with pytest.raises(UserError, match="another VAE, text encoder or tokenizer"):
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


def test_source_is_needed(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = config(tiny_sdxl, tmp_path / "s", tmp_path / "c")
    with pytest.raises(UserError, match=r"data\.source not found"):
        prepare(run)
    with pytest.raises(UserError, match=r"data\.source is missing"):
        prepare(run.model_copy(update={"data": run.data.model_copy(update={"source": None})}))
    assert not (tmp_path / "c").exists()


def test_new_pairs_reuse_what_is_encoded(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    before = contents(tmp_path / "c" / "shards")
    rows = (source / "pairs.jsonl").read_text().splitlines()
    for name in "xy":
        (source / f"{name}.png").write_bytes(png(ord(name)))
    write_jsonl(source, [{"prompt": "new", "chosen": "x.png", "rejected": "y.png"}, *rows[::-1]])
    encoded_images = 0
    start = latents.LatentEncoder.start

    def counted(self: Any, images: Any) -> Any:
        nonlocal encoded_images
        encoded_images += len(images)
        return start(self, images)

    monkeypatch.setattr(latents.LatentEncoder, "start", counted)
    assert prepare(run).pairs == 7
    assert encoded_images == 2
    after = contents(tmp_path / "c" / "shards")
    assert {name: after[name] for name in before} == before
    cache = PairCache.open(tmp_path / "c")
    assert len(cache.batch(cache.train, flip=None, drop=None).chosen_latents) == len(cache.train)


def test_another_held_out_share_encodes_nothing(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.1)).held_out == 1
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.3)
    with pytest.raises(UserError, match=r"held_out = 0\.1, the config says 0\.3"):
        PairCache.open(tmp_path / "c").check(open_sdxl(tiny_sdxl), run.data)
    monkeypatch.setattr(PipelineFolder, "load_vae", None)
    monkeypatch.setattr(PipelineFolder, "load_text_encoder", None)
    assert prepare(run).held_out == 3


def test_source_that_changes_under_way(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    choose = prepare_module.choose

    def meddle(*args: Any) -> Any:
        (source / "2l.png").write_bytes(png(99))
        return choose(*args)

    monkeypatch.setattr(prepare_module, "choose", meddle)
    with pytest.raises(UserError, match=r"pairs\.jsonl:3 in data\.source changed"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))


def test_split_is_stored_and_does_not_share_prompts(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 20, prompts=10)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.2))
    cache = PairCache.open(tmp_path / "c")
    assert (len(cache.train), len(cache.held_out)) == (summary.train, summary.held_out) == (16, 4)
    prompts = [{row.prompt for row in cache.rows(part)} for part in (cache.train, cache.held_out)]
    assert len(prompts[1]) == 2
    assert not prompts[0] & prompts[1]


def test_one_component_warns_that_nothing_is_held_out(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6, prompts=1)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c"))
    assert summary.held_out == 0
    assert [w for w in summary.warnings if w.startswith("no pair is held out")]


def test_result_does_not_depend_on_row_order(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 10)
    prepare(config(tiny_sdxl, source, tmp_path / "a", held_out=0.3))
    rows = (source / "pairs.jsonl").read_text().splitlines()
    write_jsonl(source, rows[::-1])
    prepare(config(tiny_sdxl, source, tmp_path / "b", held_out=0.3))
    one, two = (PairCache.open(tmp_path / name) for name in "ab")
    for part in ("train", "held_out"):
        assert [p.id for p in getattr(one, part)] == [p.id for p in getattr(two, part)]
    batches = [cache.batch(cache.held_out, flip=None, drop=None) for cache in (one, two)]
    np.testing.assert_allclose(*(b.chosen_latents for b in batches), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*(b.prompt_embeds for b in batches), rtol=2e-3, atol=1e-3)


def test_empty_prompt_of_a_pipeline_that_encodes_it(tmp_path: Path) -> None:
    model = make_tiny_sdxl(tmp_path / "m", force_zeros=False)
    prepare(config(model, one_pair(tmp_path / "s", png(1), png(2)), tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    batch = cache.batch(cache.train, flip=None, drop=[True])
    empty = empty_prompt(open_sdxl(model), max_tokens=77, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(batch.prompt_embeds, empty.prompt_embeds, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(batch.pooled_embeds, empty.pooled_embeds, rtol=2e-3, atol=1e-3)
    assert batch.prompt_embeds.any()


def test_a_run_that_stops_early_leaves_a_finished_cache_usable(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    for i in range(3):
        (source / f"{i}w.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 × zero-byte image"):
        prepare(run)
    assert len(PairCache.open(tmp_path / "c").train) == 5


def test_cache_inside_the_source_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    before = contents(source)
    with pytest.raises(UserError, match=r"data\.cache .* lies inside data\.source"):
        prepare(config(tiny_sdxl, source, source / "cache"))
    assert contents(source) == before


# Prompts that are the same


SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda prompt: prompt,
    str.upper,
    lambda prompt: prompt.replace(" ", "  "),
    lambda prompt: prompt.replace("e", "e\u0301"),  # NFD
    lambda prompt: prompt.replace("e", "\u00e9"),  # NFC of the same
)


def spelled_folder(folder: Path, prompts: list[str]) -> Path:
    """A pair of images of its own for every prompt."""
    rows = []
    folder.mkdir()
    for i, prompt in enumerate(prompts):
        for side, name in enumerate("wl"):
            (folder / f"{i}{name}.png").write_bytes(png(2 * i + side))
        rows.append({"prompt": prompt, "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    write_jsonl(folder, rows)
    return folder


def test_prompts_with_the_same_tokens_stay_on_one_side_and_are_encoded_once(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [f"a red thing {letter}" for letter in "abcdefghij"]
    source = spelled_folder(tmp_path / "s", [spell(thing) for thing in things for spell in SPELLINGS])
    encoded: list[str] = []
    call = prepare_module.TextEncoder.__call__

    def counted(self: Any, prompts: Any) -> Any:
        encoded.extend(prompts if self.which == 1 else ())
        return call(self, prompts)

    monkeypatch.setattr(prepare_module.TextEncoder, "__call__", counted)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.3))
    assert summary.pairs == 50
    assert summary.prompts == len(encoded) == 20, "with and without an accent"
    cache = PairCache.open(tmp_path / "c")
    sides = [
        {" ".join(unicodedata.normalize("NFC", row.prompt).lower().split()) for row in cache.rows(part)}
        for part in (cache.train, cache.held_out)
    ]
    assert len(cache.held_out) >= 10
    assert not sides[0] & sides[1]


def test_spellings_do_not_hide_duplicates_and_contradictions(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = spelled_folder(tmp_path / "s", ["a red cat", "a blue cat", "a green cat"])
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"prompt": "A  RED cat"})
    rows.append({"prompt": "A Blue CAT", "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]})
    write_jsonl(source, rows)
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5, held_out=0.0))
    assert (summary.pairs, summary.duplicates) == (2, 1)
    assert skipped(tmp_path / "c") == {"pairs.jsonl:2": "contradiction", "pairs.jsonl:5": "contradiction"}


def test_prompts_that_differ_beyond_the_last_token_only_are_the_same(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = spelled_folder(tmp_path / "s", ["x" * 80, "x" * 90, "x" * 70])
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", held_out=0.0))
    assert (summary.prompts, summary.truncated) == (2, 2)
    assert prepare(config(tiny_sdxl, source, tmp_path / "d", held_out=0.0, max_tokens=150)).prompts == 3


def test_a_spelling_that_comes_later_is_not_encoded(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = spelled_folder(tmp_path / "s", ["a red cat", "a blue cat"])
    run = config(tiny_sdxl, source, tmp_path / "c", held_out=0.0)
    prepare(run)
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    (source / "x.png").write_bytes(png(77))
    write_jsonl(
        source, rows + [rows[0] | {"prompt": p, "chosen": "x.png"} for p in ("A RED CAT", "a Red cat")]
    )
    monkeypatch.setattr(PipelineFolder, "load_text_encoder", None)
    summary = prepare(run)
    assert (summary.pairs, summary.prompts, summary.duplicates) == (3, 2, 1)


# Mistakes


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


def test_text_is_encoded_before_images(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> None:
        raise UserError("no such encoder")

    monkeypatch.setattr(PipelineFolder, "load_text_encoder", missing)
    with pytest.raises(UserError, match="no such encoder"):
        prepare(config(tiny_sdxl, jsonl_folder(tmp_path / "s", 3), tmp_path / "c"))
    assert not list((tmp_path / "c" / "shards").glob("latents-*"))


def test_bad_rows_do_not_stop_the_others(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    rows = (source / "pairs.jsonl").read_text().splitlines()
    ok = json.loads(rows[0])
    bad = [
        ok | {"prompt": "\ud83d"},
        ok | {"chosen": "\ud800\0"},
        ok | {"rejected": "y" * 300},
        "[" * 100_000,
    ]
    write_jsonl(source, [*rows, *bad])
    assert prepare(config(tiny_sdxl, source, tmp_path / "c", max_skipped=0.5)).pairs == 4
    assert skipped(tmp_path / "c") == {
        "pairs.jsonl:5": "bad caption",
        "pairs.jsonl:6": "missing image",
        "pairs.jsonl:7": "missing image",
        "pairs.jsonl:8": "bad line",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not Unicode")
def test_file_names_that_are_not_unicode(tiny_sdxl: Path, tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / "s" / side).mkdir(parents=True)
        (tmp_path / "s" / side / "a\udcff.png").write_bytes(png(len(side)))
    (tmp_path / "s" / "chosen" / "a\udcff.txt").write_text("red")
    prepare(config(tiny_sdxl, tmp_path / "s", tmp_path / "c", held_out=0.0))
    cache = PairCache.open(tmp_path / "c")
    assert cache.rows(cache.train)[0].name == r"chosen/a\udcff"


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped byte", "not parquet"])
def test_damaged_scan_part_is_scanned_again(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(scan, "PART_ROWS", 3)
    source = jsonl_folder(tmp_path / "s", 6)
    run = config(tiny_sdxl, source, tmp_path / "c")
    prepare(run)
    whole = contents(tmp_path / "c")
    part = sorted((tmp_path / "c" / "scan").iterdir())[1]
    data = part.read_bytes()
    at = data.index(b"a red thing")
    damaged = {
        "cut": data[:-20],
        "empty": b"",
        "flipped byte": data[: at + 3] + b"R" + data[at + 4 :],
        "not parquet": b"x" * 500,
    }
    part.write_bytes(damaged[damage])
    (tmp_path / "c" / "index.json").unlink()
    prepare(run)
    assert contents(tmp_path / "c") == whole


def test_image_that_vanishes_under_way(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 4)
    choose = prepare_module.choose

    def meddle(*args: Any) -> Any:
        (source / "2l.png").unlink()
        return choose(*args)

    monkeypatch.setattr(prepare_module, "choose", meddle)
    with pytest.raises(UserError, match=r"pairs\.jsonl:3 in data\.source changed"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))


@pytest.mark.parametrize("place", ["below a file", "a file's name too long", "/proc"])
def test_cache_where_none_can_be(tiny_sdxl: Path, tmp_path: Path, place: str) -> None:
    if place == "/proc" and sys.platform != "linux":
        pytest.skip("only Linux has /proc")
    source = jsonl_folder(tmp_path / "s", 3)
    (tmp_path / "file").write_text("")
    places = {"below a file": tmp_path / "file", "/proc": Path("/proc")}
    parent = places.get(place, tmp_path / ("x" * 300))
    with pytest.raises(UserError) as error:
        prepare(config(tiny_sdxl, source, parent / "c"))
    assert str(error.value).startswith(f"cannot write {parent / 'c'}: ")
    assert "\n" not in str(error.value)


def test_read_only_cache(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, whom no permission stops: the system's answer is put in its place.
    source = jsonl_folder(tmp_path / "s", 3)
    mkdir = Path.mkdir

    def refusing(self: Path, *args: Any, **options: Any) -> None:
        if self.name == "shards":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(UserError, match=r"^cannot write .*c: Read-only file system \(.*shards\)$"):
        prepare(config(tiny_sdxl, source, tmp_path / "c"))


def test_second_prepare_of_a_cache_is_refused(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tiny_sdxl, jsonl_folder(tmp_path / "s", 4), tmp_path / "c")
    choose = prepare_module.choose
    seen = []

    def meanwhile(*args: Any) -> Any:
        before = contents(tmp_path / "c")
        with pytest.raises(UserError, match="in use by another mapo-fast process"):
            prepare(run)
        assert contents(tmp_path / "c") == before
        seen.append(True)
        return choose(*args)

    monkeypatch.setattr(prepare_module, "choose", meanwhile)
    assert prepare(run).pairs == 4
    assert seen == [True]


def test_interrupt_keeps_what_is_finished(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    source = jsonl_folder(tmp_path / "s", 8)
    run = config(tiny_sdxl, source, tmp_path / "c", batch_size=2)
    prepare(config(tiny_sdxl, source, tmp_path / "whole", batch_size=2))
    start = latents.LatentEncoder.start
    calls = 0

    def interrupted(self: Any, images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return start(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(latents.LatentEncoder, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
    kept = contents(tmp_path / "c" / "shards")
    assert len([name for name in kept if name.endswith(".safetensors")]) >= 1
    assert not list((tmp_path / "c").rglob("*.tmp"))
    prepare(run)
    whole = contents(tmp_path / "whole")
    assert {f"shards/{name}" for name in kept} < set(whole)
    assert contents(tmp_path / "c") == whole
