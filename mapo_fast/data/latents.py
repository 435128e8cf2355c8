"""Images through the VAE into latent shards.

A latent is the posterior's mean, scaled as SDXL's UNet expects it (`vae.to_unet`).

The images that no shard holds yet are cut into shards in source order, so that the source is read once from
front to back. Batches never cross a shard: an interrupted run that starts a shard again forms the same
batches and gets the same bits.

Files are read and decoded in threads, a few images ahead, and a batch's latents are fetched when the next
batch has been given to the device: it waits for neither. Order and bits are those of one after the other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, fit_image
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.scan import content_hash
from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, reading
from mapo_fast.models.pipeline import PipelineFolder
from mapo_fast.models.vae import to_unet, use_tiles
from mapo_fast.util.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImageJob:
    """One distinct image to encode: where it first stands in the source, and the shape it gets."""

    row: int
    chosen: bool
    file_hash: bytes
    key: bytes
    bucket: Size


class Encoding:
    """A batch whose latents are on their way to host memory."""

    def __init__(self, pixels: Tensor, latents: Tensor) -> None:
        self.pixels = pixels
        """(n, 3, H, W) fp32 on the CPU."""
        self._latents = latents.to("cpu", non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if latents.device.type == "cuda":
            self._done = torch.cuda.current_stream(latents.device).record_event()

    def wait(self) -> Tensor:
        """The latents, (n, C, h, w), when they are there."""
        if self._done is None:
            return self._latents
        self._done.synchronize()
        return self._latents.clone()  # pinned memory is for copies alone


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
        self, folder: PipelineFolder, dtype: str, device: torch.device, *, tiles: int | None = None
    ) -> None:
        self.folder, self.dtype, self.device = folder, DTYPES[dtype], device
        self.config = folder.config("vae")
        self.tiles = tiles
        self.vae = self._load(self.dtype)
        self._vae_fp32: Any = self.vae if self.dtype is torch.float32 else None
        self.retries = 0

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Latents (C, h, w) of equally sized RGB images; None where even fp32 gives NaN or Inf."""
        return self.finish(self.start(images))

    def start(self, images: Sequence[Image.Image]) -> Encoding:
        """Give equally sized RGB images to the device, and go on while it encodes them."""
        pixels = torch.stack([_pixels(image) for image in images])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return Encoding(pixels, self._encode(self.vae, pixels))

    def finish(self, encoding: Encoding) -> list[Tensor | None]:
        """Wait for the latents of what was started first: see `__call__`."""
        pixels = encoding.pixels
        latents: list[Tensor | None] = list(encoding.wait())
        for index, latent in enumerate(latents):
            if latent is not None and not latent.isfinite().all():
                self.retries += 1
                if self._vae_fp32 is None:
                    self._vae_fp32 = self._load(torch.float32)
                again = self._encode(self._vae_fp32, pixels[index : index + 1])[0].cpu()
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
        images = pixels.to(self.device, vae.dtype, non_blocking=True)
        mean: Tensor = vae.encode(images).latent_dist.mode().float()
        return to_unet(mean, self.config).to(self.dtype)


def _pixels(image: Image.Image) -> Tensor:  # (3, H, W) fp32 in [−1, 1]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def latent_shape(folder: PipelineFolder, bucket: Size) -> tuple[int, int, int]:
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
    started: deque[tuple[_Filling, list[ImageJob], list[Encoding]]] = deque()

    def start(filling: _Filling) -> None:
        batch = [image for _, image in filling.waiting]
        views = [encoder.start(batch)]
        if flip:
            views.append(encoder.start([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in batch]))
        started.append((filling, [job for job, _ in filling.waiting], views))
        filling.waiting.clear()
        if len(started) > 1:
            finish()

    def finish() -> None:
        filling, batch, views = started.popleft()
        found = [encoder.finish(view) for view in views]
        for job, *halves in zip(batch, *found, strict=True):
            latents = [latent for latent in halves if latent is not None]
            if len(latents) < len(halves):
                failed.append(job.key)
            else:
                filling.latents[job.key] = torch.stack(latents) if flip else latents[0]
        progress(len(batch))

    with warnings.catch_warnings(), closing(images(jobs, source)) as coming:
        warnings.simplefilter("ignore")  # decoders do so too, but several at a time put back what others set
        for job, image in coming:
            filling = buckets.setdefault(job.bucket, _Filling())
            filling.waiting.append((job, image))
            if len(filling.waiting) == batch_size:
                start(filling)
        for filling in buckets.values():
            if filling.waiting:
                start(filling)
        while started:
            finish()

    tensors: dict[str, Tensor] = {}
    for (height, width), filling in buckets.items():
        if filling.latents:
            tensors[f"latents_{height}x{width}"] = torch.stack(list(filling.latents.values()))
            tensors[f"keys_{height}x{width}"] = shards.pack_keys(list(filling.latents))
    if failed:
        tensors["failed"] = shards.pack_keys(failed)
    return tensors


def images(
    jobs: Sequence[ImageJob], source: PreferencePairs
) -> Generator[tuple[ImageJob, Image.Image], None, None]:
    """The jobs' images in source order, cropped and scaled to their buckets.

    One thread reads and some decode, at most `AHEAD` images ahead of the one that was given out last.

    Raises:
        UserError: the source changed since it was scanned.
    """
    files = _files(jobs, source)
    reader, decoders = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(DECODERS, "decoder")

    def read() -> tuple[ImageJob, Future[Image.Image]] | None:
        if (found := next(files, None)) is None:
            return None
        job, data = found
        return job, decoders.submit(lambda: fit_image(decode_image(data), job.bucket))

    try:
        coming = deque(reader.submit(read) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not None:
            job, image = item
            coming.append(reader.submit(read))
            yield job, image.result()
    finally:
        reader.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


DECODERS = min(4, os.cpu_count() or 1)
"""Threads that decode: each may hold an image of `images.MAX_PIXELS` pixels."""
AHEAD = 2 * DECODERS


def _files(jobs: Sequence[ImageJob], source: PreferencePairs) -> Iterator[tuple[ImageJob, bytes]]:
    """The jobs' image files, in source order."""
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
                yield job, data
