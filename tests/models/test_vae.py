"""The VAE's working memory, and encoding and decoding in tiles."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bench.live_memory import LiveMemory
from mapo_fast.data.cache import PairCache
from mapo_fast.data.prepare import prepare
from mapo_fast.data.vae_encoder import LatentEncoder
from mapo_fast.demo import world
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sample import decode_latents
from mapo_fast.models.text import TextEncoder
from mapo_fast.models.vae import decode_bytes, encode_bytes, from_unet, to_unet, use_tiles
from mapo_fast.planner import stages
from mapo_fast.planner.stages import how_to_prepare
from mapo_fast.settings.load import parse_config
from mapo_fast.util.console import Terminal
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import config, jsonl_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
TINY = Path(world.__file__).parent / "assets" / "tiny-sdxl"
SDXL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
}


@pytest.mark.slow
def test_working_memory_of_sdxls_vae() -> None:
    """One image at 1024² in fp32, traced."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL(**SDXL_VAE).eval().requires_grad_(False)
    mode = FakeTensorMode()
    for module in vae.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, p.detach(), CPU), False)
    said = [count(SDXL_VAE, 1024 * 1024, 4) for count in (encode_bytes, decode_bytes)]
    with mode, torch.no_grad():
        for want, run, shape in (
            (said[0], vae.encode, (1, 3, 1024, 1024)),
            (said[1], vae.decode, (1, 4, 128, 128)),
        ):
            with LiveMemory(vae.parameters()) as memory:
                weights = memory.live
                run(torch.zeros(shape))
            assert memory.peak - weights == pytest.approx(want, rel=0.02)


def image() -> Any:
    return world.random_drawing(random.Random(3)).image()


@pytest.mark.slow
def test_tiles_are_smaller_and_what_they_change_is_told() -> None:
    """The demo's trained VAE, an image of 2 × 2 tiles and their overlaps."""
    folder = open_sdxl(TINY)
    whole = LatentEncoder(folder, "fp32", CPU)
    tiled = LatentEncoder(folder, "fp32", CPU, tiles=16)
    sizes: list[int] = []
    tiled.vae.encoder.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[-1]))
    latent, other = (encoder([image()])[0] for encoder in (whole, tiled))
    assert latent is not None
    assert other is not None
    assert max(sizes) == 16
    assert other.shape == latent.shape
    error = float((other - latent).norm() / latent.norm())
    assert 0 < error < 1  # a quarter of a 32-pixel image has group norms of its own
    assert tiled.tiling_error(image()) == pytest.approx(error)
    pictures = [
        np.asarray(decode_latents(vae, latent[None])[0], dtype=float)
        for vae in (whole.vae, use_tiles(folder.load_vae(), 16))
    ]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 20  # of 255


def test_small_images_stay_whole() -> None:
    folder = open_sdxl(TINY)
    got, want = (LatentEncoder(folder, "fp32", CPU, tiles=tiles)([image()])[0] for tiles in (512, None))
    assert got is not None
    assert want is not None
    assert torch.equal(got, want)


@pytest.mark.slow
def test_prepare_says_what_tiling_changes(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mapo_fast.data.latents.TILE", 16)
    out = io.StringIO()
    source = jsonl_folder(tmp_path / "s", 3)
    prepare(config(tiny_sdxl, source, tmp_path / "c", vae_tiling=True), callbacks=Terminal(Console(file=out)))
    assert "data.vae_tiling changes latents by " in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ({"batch_size": 4}, "4 image(s) at once: set data.batch_size = 1, or close"),
        ({"vae_tiling": True}, "1 image(s) at once: close what else uses the GPU"),
        ({"resolution": 1024}, "set data.vae_tiling = true and another data.cache, as tiles change"),
    ],
)
def test_a_gpu_too_small_for_images_is_told_what_to_do(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], advice: str
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LatentEncoder, "_encode", full)
    monkeypatch.setattr(LatentEncoder, "tiling_error", lambda *_: 0.0)
    with pytest.raises(UserError, match=re.escape(advice)):
        prepare(config(tiny_sdxl, jsonl_folder(tmp_path / "s", 3), tmp_path / "c", **data))


@pytest.mark.slow
def test_a_library_without_gpu_memory_is_told_the_same_and_other_errors_are_not(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl_folder(tmp_path / "s", 3)
    for words, kind, message in (
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
            UserError,
            "out of GPU memory while encoding",
        ),
        ("CUDA error: an illegal memory access", RuntimeError, "illegal memory access"),
    ):

        def fail(*_: Any, words: str = words) -> None:
            raise RuntimeError(words)

        monkeypatch.setattr(LatentEncoder, "_encode", fail)
        with pytest.raises(kind, match=message):
            prepare(config(tiny_sdxl, source, tmp_path / "c"))


@pytest.mark.slow
def test_prepare_is_capped_as_training_is(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By train.vram or by what is free, from before the first tensor to after the last one."""
    caps: list[Any] = []

    @contextmanager
    def capped(vram: int | None) -> Iterator[None]:
        caps.append(vram)
        yield
        caps.append("lifted")

    def full(*_: Any) -> None:
        assert caps in ([None], [6 * 2**30])
        raise torch.OutOfMemoryError

    source = jsonl_folder(tmp_path / "s", 3)
    run = config(tiny_sdxl, source, tmp_path / "c")
    monkeypatch.setattr("mapo_fast.hardware.gpu.capped", capped)
    prepare(run)
    assert caps == [None, "lifted"]
    caps.clear()
    monkeypatch.setattr(LatentEncoder, "_encode", full)
    run = config(tiny_sdxl, source, tmp_path / "d")
    run = run.model_copy(update={"train": run.train.model_copy(update={"vram": "6GiB"})})
    with pytest.raises(UserError, match=r"raise train\.vram = '6GiB'"):
        prepare(run)


@pytest.mark.slow
def test_a_text_encoder_that_does_not_fit_runs_on_the_cpu(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU continues after the prompts that are encoded already."""
    source = jsonl_folder(tmp_path / "s", 5)
    prepare(config(tiny_sdxl, source, tmp_path / "whole"))
    monkeypatch.setattr("mapo_fast.data.embeddings.BATCH", 2)
    monkeypatch.setattr("mapo_fast.data.shards.SHARD_BYTES", 1)
    call, calls = TextEncoder.__call__, []

    def small(self: TextEncoder, prompts: Any) -> Any:
        calls.append(self.which)
        if self.which == 2 and calls.count(2) == 3:
            raise torch.OutOfMemoryError
        return call(self, prompts)

    monkeypatch.setattr(TextEncoder, "__call__", small)
    out = io.StringIO()
    prepare(config(tiny_sdxl, source, tmp_path / "c"), callbacks=Terminal(Console(file=out, width=200)))
    assert "text encoder 2 does not fit the GPU's free memory: on the CPU" in out.getvalue()
    assert calls.count(2) == calls.count(1) + 1, "nothing is encoded twice"
    caches = [PairCache.open(tmp_path / name) for name in ("whole", "c")]
    batches = [cache.batch(cache.train[:], flip=None, drop=None) for cache in caches]
    torch.testing.assert_close(batches[0].prompt_embeds, batches[1].prompt_embeds)


def test_what_makes_prepare_fit() -> None:
    data = {"cache": "c", "batch_size": 4}
    asked = parse_config({"model": {"path": "m"}, "data": data, "train": {"output": "o"}})
    assert how_to_prepare(asked, stages.SDXL_VAE, 12 * 2**30) == ""
    assert (
        how_to_prepare(asked, stages.SDXL_VAE, 3 * 2**30) == "prepare fits with data.batch_size = 1: 2.81 GiB"
    )
    tiled = how_to_prepare(asked, stages.SDXL_VAE, 2**30)
    assert tiled.startswith("prepare fits with data.batch_size = 1 and data.vae_tiling = true: 0.94 GiB, but")
    assert "does not fit on this card" in how_to_prepare(asked, stages.SDXL_VAE, 2**29)


STATISTICS = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}


@pytest.mark.parametrize("statistics", [{}, STATISTICS])
def test_what_is_decoded_is_what_was_encoded(statistics: dict[str, Any]) -> None:
    config = {"scaling_factor": 0.5, **statistics}
    mean = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(from_unet(to_unet(mean, config), config), mean)
    if statistics:  # as Playground v2.5's
        scaled = (mean[1, 2, 0, 0] + 1.383) / 6.5498 * 0.5
        torch.testing.assert_close(to_unet(mean, config)[1, 2, 0, 0], scaled)


def test_a_preview_of_a_vae_with_latent_statistics_is_the_image(tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **STATISTICS, "scaling_factor": 0.5}))
    encoder = LatentEncoder(open_sdxl(model), "fp32", CPU)
    latent = encoder([image()])[0]
    assert latent is not None
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():  # as diffusers' SDXL pipeline
        decoded = encoder.vae.decode(latent[None] * std / 0.5 + mean).sample
    want = np.asarray(VaeImageProcessor(vae_scale_factor=4).postprocess(decoded)[0], dtype=float)
    got = np.asarray(decode_latents(encoder.vae, latent[None])[0], dtype=float)
    assert np.abs(got - want).max() <= 1  # a rounding
