"""Images through the VAE into latent shards.

A latent is the posterior's mean, scaled as SDXL's UNet expects it (`vae.to_unet`).

The images that no shard holds yet are cut into shards in source order, so that the source is read once from
front to back. Batches never cross a shard: an interrupted run that starts a shard again forms the same
batches and gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, fit_image
from mapo_fast.data.images import decode_image
from mapo_fast.data.pairs import MissingImageError, PairRecord, PreferencePairs, reading
from mapo_fast.data.scan import content_hash
from mapo_fast.errors import UserError
from mapo_fast.model import SDXLFolder
from mapo_fast.vae import to_unet, use_tiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImageJob:
    """One distinct image to encode: where it first stands in the source, and the shape it gets."""

    row: int
    chosen: bool
    file_hash: bytes
    key: bytes
    bucket: Size


class LatentEncoder:
    """The VAE's encoder, with a second one in fp32 as soon as a latent comes out non-finite.

    Args:
        folder: the pipeline.
        dtype: `fp32` or `bf16`.
        device: where to encode.
        tiles: side in pixels of the tiles that larger images are encoded in; None encodes them whole.

    Raises:
        UserError: the VAE cannot be loaded.
    """

    def __init__(
        self, folder: SDXLFolder, dtype: str, device: torch.device, *, tiles: int | None = None
    ) -> None:
        self.folder, self.dtype, self.device = folder, DTYPES[dtype], device
        self.config = folder.config("vae")
        self.tiles = tiles
        self.vae = self._load(self.dtype)
        self._vae_fp32: Any = self.vae if self.dtype is torch.float32 else None
        self.retries = 0

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Latents (C, h, w) of equally sized RGB images; None where even fp32 gives NaN or Inf."""
        pixels = torch.stack([_pixels(image) for image in images])
        latents: list[Tensor | None] = list(self._encode(self.vae, pixels))
        for index, latent in enumerate(latents):
            if latent is not None and not latent.isfinite().all():
                self.retries += 1
                if self._vae_fp32 is None:
                    self._vae_fp32 = self._load(torch.float32)
                again = self._encode(self._vae_fp32, pixels[index : index + 1])[0]
                latents[index] = again if again.isfinite().all() else None
        return latents

    def tiling_error(self, image: Image.Image) -> float:
        """‖tiled − whole‖ / ‖whole‖ of an image's latent. Encodes it whole once, on the CPU."""
        whole = LatentEncoder(self.folder, "fp32", torch.device("cpu"))([image])[0]
        tiled = self([image])[0]
        if whole is None or tiled is None:
            return math.nan
        return float((tiled.float() - whole).norm() / whole.norm())

    def _load(self, dtype: torch.dtype) -> Any:
        vae = self.folder.load_vae(dtype).to(self.device)
        return vae if self.tiles is None else use_tiles(vae, self.tiles)

    @torch.no_grad()
    def _encode(self, vae: Any, pixels: Tensor) -> Tensor:
        mean: Tensor = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float()
        return to_unet(mean, self.config).to(self.dtype).cpu()


def _pixels(image: Image.Image) -> Tensor:  # (3, H, W) fp32 in [−1, 1]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def latent_shape(folder: SDXLFolder, bucket: Size) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a bucket.

    Raises:
        UserError: the bucket's sides are no multiples of the VAE's factor.
    """
    config = folder.config("vae")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if bucket[0] % factor or bucket[1] % factor:
        raise UserError(f"the VAE shrinks images by {factor}: set data.bucket_step to a multiple of {factor}")
    return config["latent_channels"], bucket[0] // factor, bucket[1] // factor


def plan(jobs: Sequence[ImageJob], bytes_of: Callable[[Size], int]) -> list[list[ImageJob]]:
    """Cut the jobs, in order, into shards of at most `SHARD_BYTES` (at least one image each)."""
    cut: list[list[ImageJob]] = []
    filled = 0
    for job in jobs:
        size = bytes_of(job.bucket)
        if not cut or filled + size > shards.SHARD_BYTES:
            cut.append([])
            filled = 0
        cut[-1].append(job)
        filled += size
    return cut


@dataclass
class _Filling:
    """The part of a shard that belongs to one bucket."""

    waiting: list[tuple[ImageJob, Image.Image]] = field(default_factory=list)
    latents: dict[bytes, Tensor] = field(default_factory=dict)


def encode_shard(
    jobs: Sequence[ImageJob],
    source: PreferencePairs,
    encoder: LatentEncoder,
    *,
    batch_size: int,
    flip: bool,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Encode one shard's images; the tensors of the shard (see `shards`).

    Raises:
        UserError: the source changed since it was scanned.
    """
    buckets: dict[Size, _Filling] = {}
    failed: list[bytes] = []

    def encode(filling: _Filling) -> None:
        images = [image for _, image in filling.waiting]
        views = [encoder(images)]
        if flip:
            views.append(encoder([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]))
        for index, (job, _) in enumerate(filling.waiting):
            latents = [latent for view in views if (latent := view[index]) is not None]
            if len(latents) < len(views):
                failed.append(job.key)
            else:
                filling.latents[job.key] = torch.stack(latents) if flip else latents[0]
        progress(len(images))
        filling.waiting.clear()

    for job, image in images(jobs, source):
        filling = buckets.setdefault(job.bucket, _Filling())
        filling.waiting.append((job, image))
        if len(filling.waiting) == batch_size:
            encode(filling)
    for filling in buckets.values():
        if filling.waiting:
            encode(filling)

    tensors: dict[str, Tensor] = {}
    for (height, width), filling in buckets.items():
        if filling.latents:
            tensors[f"latents_{height}x{width}"] = torch.stack(list(filling.latents.values()))
            tensors[f"keys_{height}x{width}"] = shards.pack_keys(list(filling.latents))
    if failed:
        tensors["failed"] = shards.pack_keys(failed)
    return tensors


def images(jobs: Sequence[ImageJob], source: PreferencePairs) -> Iterator[tuple[ImageJob, Image.Image]]:
    """The jobs' images in source order, cropped and scaled to their buckets.

    Raises:
        UserError: the source changed since it was scanned.
    """
    by_row: dict[int, list[ImageJob]] = {}
    for job in jobs:
        by_row.setdefault(job.row, []).append(job)
    with reading(source.where):
        for row in source.read(sorted(by_row)):
            for job in by_row[row.index]:
                data = b""
                if isinstance(row, PairRecord):
                    with suppress(MissingImageError):
                        read = row.chosen if job.chosen else row.rejected
                        data = b"" if read is None else read()
                if content_hash(data) != job.file_hash:
                    raise UserError(
                        f"{row.name} in data.source changed during prepare: run the command again"
                    )
                yield job, fit_image(decode_image(data), job.bucket)
