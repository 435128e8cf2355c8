"""Images through the VAE."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mapo_fast.data import vae_encoder
from mapo_fast.data.cache import PairCache
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.prepare import prepare
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.text import encode_prompts
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    encoded,
    jsonl_folder,
    picture,
    png,
    skipped,
)
from tests.data.preparing import one_pair, reference_latents


@pytest.mark.slow
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


@pytest.mark.slow
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
    load = Pipeline.load_vae
    monkeypatch.setattr(
        Pipeline, "load_vae", lambda self, dtype=torch.float32: Overflowing(load(self, dtype), always)
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


@pytest.mark.slow
def test_latents_that_stay_nan_are_skipped_and_listed(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, always=True)
    source = jsonl_folder(tmp_path / "s", 6)
    (source / "3l.png").write_bytes(white_corner(1))
    summary = prepare(config(tiny_sdxl, source, tmp_path / "c", vae_dtype="bf16"))
    assert (summary.pairs, summary.nan_retries) == (5, 1)
    assert skipped(tmp_path / "c") == {"pairs.jsonl:4": "non-finite latent"}
    with pytest.raises(UserError, match=r"1 × non-finite latent.*name another VAE as model\.vae"):
        prepare(config(tiny_sdxl, source, tmp_path / "d", vae_dtype="bf16", max_skipped=0.1))
    assert list((tmp_path / "d" / "shards").glob("latents-*")), "what is encoded is kept"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents_mean", "shift_factor"])
def test_vae_with_other_latent_statistics(tiny_sdxl: Path, tmp_path: Path, kind: str) -> None:

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
    model = open_sdxl(tiny_sdxl)
    monkeypatch.setattr(
        Pipeline, "config", lambda self, part: {"block_out_channels": [1] * 5, "latent_channels": 4}
    )
    with pytest.raises(UserError, match=r"set data\.bucket_step to a multiple of 16"):
        vae_encoder.latent_shape(model, (40, 24))
