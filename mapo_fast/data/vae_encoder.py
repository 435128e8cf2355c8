"""The VAE's encoder: latents of images, as SDXL's UNet expects them.

A latent is the posterior's mean, scaled (`vae.to_unet`). A batch can be started before the one before it is
fetched: the device waits for neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mapo_fast.data.buckets import Size
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.vae import to_unet, use_tiles
from mapo_fast.util.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        self, folder: Pipeline, dtype: str, device: torch.device, *, tiles: int | None = None
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


def latent_shape(folder: Pipeline, bucket: Size) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a bucket.

    Raises:
        UserError: the bucket's sides are no multiples of the VAE's factor.
    """
    config = folder.config("vae")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if bucket[0] % factor or bucket[1] % factor:
        raise UserError(f"the VAE shrinks images by {factor}: set data.bucket_step to a multiple of {factor}")
    return config["latent_channels"], bucket[0] // factor, bucket[1] // factor
