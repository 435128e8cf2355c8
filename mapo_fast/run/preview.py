"""Previews: the same prompts and start noise sampled at several steps of a run.

The text encoders are loaded once, before the UNet (on the CPU where the GPU's budget is too small for them),
and the VAE only while it decodes, one image at a time and in tiles where it is larger than 512 × 512 pixels.
Beside the UNet and its optimizer that takes 0.3 GiB of weights and 0.8 GiB to work in, whatever the image's
size, and training keeps neither.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mapo_fast.hardware.gpu import is_out_of_memory
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sample import decode_latents, sample_latents, sampler
from mapo_fast.models.text import PromptEmbeds, empty_prompt, encode_prompts
from mapo_fast.models.vae import use_tiles
from mapo_fast.settings.schema import Config
from mapo_fast.util.files import atomic_path, disk_errors


class Previews:
    """Samples a run's preview prompts; make it before the UNet is loaded."""

    def __init__(self, config: Config, folder: Pipeline, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.poll: Callable[[], None] = lambda: None
        """Called after each denoising step, by all that sample; what it raises ends a preview."""
        self.poll_alone: Callable[[], None] = lambda: None
        """Called before each decoding, which the main process does."""
        sampler(folder, config.preview.steps)  # what is wrong with it is said before the first step
        try:
            self.prompts, self.empty = self._encoded(device)
            return
        except RuntimeError as error:  # the larger encoder has 2.6 GiB, more than some plans
            if not is_out_of_memory(error):  # what it holds goes with the error
                raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.prompts, self.empty = self._encoded(torch.device("cpu"))

    def _encoded(self, device: torch.device) -> tuple[PromptEmbeds, PromptEmbeds]:
        """The prompts and the empty one."""
        settings: dict[str, Any] = {
            "max_tokens": self.config.data.max_tokens,
            "device": device,
            "dtype": torch.float32,
        }
        prompts = encode_prompts(self.folder, self.config.preview.prompts, **settings)
        return prompts, empty_prompt(self.folder, **settings)

    def complete(self, step: int) -> bool:
        """Whether all images of a step are there."""
        count, folder = len(self.config.preview.prompts), self._folder(step)
        return all((folder / f"{index:02d}.png").is_file() for index in range(count))

    def write(
        self,
        unet: Any,
        step: int,
        context: AbstractContextManager[None],
        *,
        main: bool = True,
    ) -> None:
        """Write `<output>/previews/step-XXXXXXXX/NN.png`, one image per prompt.

        Processes other than the main one only sample: a UNet that is split runs in all of them.
        """
        preview, side = self.config.preview, self.config.data.resolution
        with context:
            latents = sample_latents(
                unet,
                self.folder,
                self.prompts,
                self.empty,
                seeds=[preview.seed + i for i in range(len(preview.prompts))],
                height=side,
                width=side,
                steps=preview.steps,
                guidance=preview.guidance,
                batch_size=1,
                poll=self.poll,
            )
        if not main:
            return
        vae = use_tiles(self.folder.load_vae(torch.float32).to(self.device))
        target = self._folder(step)
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
        for index, latent in enumerate(torch.split(latents, 1)):
            self.poll_alone()
            (image,) = decode_latents(vae, latent, batch_size=1)
            with atomic_path(target / f"{index:02d}.png") as temporary:
                image.save(temporary, format="PNG")
        del vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what decoding took, for the rest of the step

    def _folder(self, step: int) -> Path:
        return self.config.train.output / "previews" / f"step-{step:08d}"
