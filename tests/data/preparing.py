"""What several tests of `prepare` share."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from mapo_fast.data.buckets import fit_image
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.prepare import prepare
from mapo_fast.data.vae_encoder import LatentEncoder
from mapo_fast.models.open import open_sdxl
from mapo_fast.util.console import Terminal
from tests.data.pair_sources import (
    write_jsonl,
)


def said(run: Any, **options: Any) -> tuple[Any, str]:
    """Result of prepare and what it printed."""
    out = io.StringIO()
    result = prepare(run, **options, callbacks=Terminal(Console(file=out, width=200)))
    return result, out.getvalue()


@contextmanager
def counting_images() -> Iterator[list[int]]:
    """Within, the number of images in every batch that is encoded."""
    counts: list[int] = []
    start = LatentEncoder.start

    def counted(self: LatentEncoder, images: Any) -> Any:
        counts.append(len(images))
        return start(self, images)

    with patch.object(LatentEncoder, "start", counted):
        yield counts


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


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


SHARDS = [
    "shards/latents-00000.safetensors",
    "shards/text1-00001.safetensors",
    "shards/text2-00000.safetensors",
]
