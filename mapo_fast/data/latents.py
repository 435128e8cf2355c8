"""Images through the VAE into latent shards.

The images that no shard holds yet are cut into shards in source order, so that the source is read once from
front to back. Batches never cross a shard: an interrupted run that starts a shard again forms the same
batches and gets the same bits.

Files are read and decoded in threads, a few images ahead, and a batch's latents are fetched when the next
batch has been given to the device: it waits for neither. Order and bits are those of one after the other.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from mapo_fast.data import shards
from mapo_fast.data.buckets import Size, fit_image
from mapo_fast.data.choose import ImageJob
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.scan import content_hash
from mapo_fast.data.shards import ShardFamily
from mapo_fast.data.sources.base import MissingImageError, PairRecord, PreferencePairs, reading
from mapo_fast.data.vae_encoder import DTYPES, Encoding, LatentEncoder, latent_shape
from mapo_fast.hardware import gpu
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.vae import TILE, encoding_with_less, setting_text
from mapo_fast.settings.schema import DataConfig
from mapo_fast.util.errors import UserError
from mapo_fast.util.progress import Callbacks, stage

DECODERS = min(4, os.cpu_count() or 1)
"""Threads that decode: each may hold an image of `images.MAX_PIXELS` pixels."""
AHEAD = 2 * DECODERS


def encode_images(
    jobs: Sequence[ImageJob],
    family: ShardFamily,
    source: PreferencePairs,
    folder: Pipeline,
    data: DataConfig,
    *,
    vram: str | None,
    device: torch.device,
    callbacks: Callbacks,
) -> None:
    """Encode the images that the shards do not hold yet.

    Args:
        jobs: distinct images, in source order.
        family: the shards `latents`, which are written to.
        source: the source of the images.
        folder: the pipeline.
        data: the settings.
        vram: `train.vram`, for the message where memory runs out.
        device: where to encode.
        callbacks: called with progress.

    Raises:
        UserError: the VAE cannot be loaded, the source changed since it was scanned, or the GPU's memory does
            not suffice.
    """
    jobs = [job for job in jobs if job.key not in family]
    if not jobs:
        return
    try:
        _encode(jobs, family, source, folder, data, device, callbacks)
    except RuntimeError as error:
        if not gpu.is_out_of_memory(error):
            raise
        raise UserError(_too_large(data, vram)) from None
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _encode(
    jobs: Sequence[ImageJob],
    family: ShardFamily,
    source: PreferencePairs,
    folder: Pipeline,
    data: DataConfig,
    device: torch.device,
    callbacks: Callbacks,
) -> None:
    tiles = TILE if data.vae_tiling else None
    encoder = LatentEncoder(folder, data.vae_dtype, device, tiles=tiles)
    if tiles is not None:
        _report_tiling(encoder, jobs, source, callbacks)
    with stage(callbacks, "images", len(jobs)) as advance:
        for part in _cut(jobs, lambda bucket: latent_bytes(folder, data, bucket)):
            before = encoder.retries
            tensors = encode_shard(
                part, source, encoder, batch_size=data.batch_size, flip=data.flip, progress=advance
            )
            family.write(tensors, encoder.retries - before)


def _cut(jobs: Sequence[ImageJob], bytes_of: Callable[[Size], int]) -> list[list[ImageJob]]:
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
    shard = _Shard(encoder, batch_size, flip, progress)
    with warnings.catch_warnings(), closing(read_images(jobs, source)) as coming:
        warnings.simplefilter("ignore")  # decoders do so too, but several at a time put back what others set
        for job, image in coming:
            shard.add(job, image)
        return shard.complete()


@dataclass
class _Filling:
    """The part of a shard that belongs to one bucket."""

    waiting: list[tuple[ImageJob, Image.Image]] = field(default_factory=list)
    latents: dict[bytes, Tensor] = field(default_factory=dict)


class _Shard:
    """A shard that is being encoded: a batch per bucket waits until it is full.

    The latents of a started batch are fetched when the next one has been started.
    """

    def __init__(
        self, encoder: LatentEncoder, batch_size: int, flip: bool, progress: Callable[[int], None]
    ) -> None:
        self._encoder, self._batch_size, self._flip, self._progress = encoder, batch_size, flip, progress
        self._buckets: dict[Size, _Filling] = {}
        self._failed: list[bytes] = []
        self._started: deque[tuple[_Filling, list[ImageJob], list[Encoding]]] = deque()

    def add(self, job: ImageJob, image: Image.Image) -> None:
        """Add an image."""
        filling = self._buckets.setdefault(job.bucket, _Filling())
        filling.waiting.append((job, image))
        if len(filling.waiting) == self._batch_size:
            self._start(filling)

    def complete(self) -> dict[str, Tensor]:
        """Encode the waiting images; returns the shard's tensors."""
        for filling in self._buckets.values():
            if filling.waiting:
                self._start(filling)
        while self._started:
            self._fetch()
        tensors: dict[str, Tensor] = {}
        for (height, width), filling in self._buckets.items():
            if filling.latents:
                tensors[f"latents_{height}x{width}"] = torch.stack(list(filling.latents.values()))
                tensors[f"keys_{height}x{width}"] = shards.pack_keys(list(filling.latents))
        if self._failed:
            tensors["failed"] = shards.pack_keys(self._failed)
        return tensors

    def _start(self, filling: _Filling) -> None:
        batch = [image for _, image in filling.waiting]
        views = [self._encoder.start(batch)]
        if self._flip:
            mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in batch]
            views.append(self._encoder.start(mirrored))
        self._started.append((filling, [job for job, _ in filling.waiting], views))
        filling.waiting.clear()
        if len(self._started) > 1:
            self._fetch()

    def _fetch(self) -> None:
        filling, batch, views = self._started.popleft()
        found = [self._encoder.finish(view) for view in views]
        for job, *halves in zip(batch, *found, strict=True):
            latents = [latent for latent in halves if latent is not None]
            if len(latents) < len(halves):
                self._failed.append(job.key)
            else:
                filling.latents[job.key] = torch.stack(latents) if self._flip else latents[0]
        self._progress(len(batch))


def read_images(
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


def _report_tiling(
    encoder: LatentEncoder, jobs: Sequence[ImageJob], source: PreferencePairs, callbacks: Callbacks
) -> None:
    """A message on how much tiling changes the first tiled image."""
    large = [job for job in jobs if max(job.bucket) > TILE][:1]
    with closing(read_images(large, source)) as found:
        for _, image in found:
            error = encoder.tiling_error(image)
            callbacks.message(f"data.vae_tiling changes latents by {error:.2%} (first image)")


def _too_large(data: DataConfig, vram: str | None) -> str:
    """The remedy where encoding images runs out of GPU memory."""
    less = next(iter(encoding_with_less(data)), {})
    elsewhere = " and another data.cache, as tiles change the latents" if "vae_tiling" in less else ""
    change = f"set {setting_text(less)}{elsewhere}, or " if less else ""
    change += f"raise train.vram = {vram!r}, or " if vram else ""
    return (
        f"out of GPU memory while encoding {data.batch_size} image(s) at once: {change}close what "
        "else uses the GPU, or hide it (CUDA_VISIBLE_DEVICES=) to encode on the CPU; what has been "
        "encoded stays"
    )


def latent_bytes(folder: Pipeline, data: DataConfig, bucket: Size) -> int:
    """Bytes of an image's latents in a shard, its mirror image's included."""
    channels, height, width = latent_shape(folder, bucket)
    size = channels * height * width * DTYPES[data.vae_dtype].itemsize
    return size * 2 if data.flip else size
