"""Previews: the same prompts and start noise sampled at several steps of a run.

Prompts are read, and noise is drawn, as `mapo-fast sample` does it.

Each prompt is sampled as a square and, where most pairs have another shape, in that shape too.

The text encoders are loaded once, before the UNet (on the CPU where the GPU's budget is too small for them),
and the VAE only while it decodes, one image at a time and in tiles where it is larger than 512 × 512 pixels.
In addition to the UNet and its optimizer, decoding takes 0.3 GiB of weights and 0.8 GiB to work in, whatever
the image's size; both are freed before training goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mapo_fast.hardware.gpu import is_out_of_memory
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sample import decode_latents, noise_seed, sample_latents
from mapo_fast.models.schedulers import scheduler
from mapo_fast.models.text import PromptEmbeds, empty_prompt, encode_prompts
from mapo_fast.models.vae import use_tiles
from mapo_fast.run.preview_files import Size, jobs, save, step_folder, texts, write_contact_sheet
from mapo_fast.settings.schema import Config
from mapo_fast.util.files import disk_errors


class Previews:
    """Samples a run's preview prompts; make it before the UNet is loaded."""

    def __init__(
        self, config: Config, folder: Pipeline, device: torch.device, shape: Size | None = None
    ) -> None:
        """Encode the prompts.

        Args:
            config: the run's settings.
            folder: the model.
            device: the device to sample on.
            shape: shape of most pairs' images, (height, width) in pixels.

        Raises:
            UserError: the model's scheduler cannot sample.
        """
        self.config, self.folder, self.device = config, folder, device
        self.texts = texts(config)
        square = (config.data.resolution, config.data.resolution)
        self.sizes: tuple[Size, ...] = tuple(dict.fromkeys((square, shape or square)))
        self.poll: Callable[[], None] = lambda: None
        """Called after each denoising step, by all sampling processes; an exception in it ends a preview."""
        self.poll_alone: Callable[[], None] = lambda: None
        """Called before each decoding, which the main process does."""
        scheduler(folder, config.preview.steps)  # what is wrong with it is said before the first step
        try:
            self.prompts, self.empty = self._encoded(device)
            return
        except RuntimeError as error:  # the larger encoder has 2.6 GiB, more than some plans
            if not is_out_of_memory(error):  # memory that the error holds is freed with it
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
        prompts = encode_prompts(self.folder, self.texts, **settings)
        return prompts, empty_prompt(self.folder, **settings)

    def complete(self, step: int) -> bool:
        """Whether all images of a step are there."""
        folder, average = step_folder(self.config, step), step and self.config.ema.half_life is not None
        names = [
            name for what in (("", "ema") if average else ("",))
            for _, _, name in jobs(self.config, self.sizes, what)
        ]  # fmt: skip
        return all((folder / name).is_file() for name in names)

    def write(
        self,
        unet: Any,
        step: int,
        context: AbstractContextManager[None],
        *,
        main: bool = True,
        what: str = "",
    ) -> list[Path]:
        """Write `<output>/previews/step-XXXXXXXX/NN-words-of-the-prompt.png`, and the contact sheet.

        Processes other than the main one only sample: a UNet that is split runs in all of them. `what` is the
        end of the files' names, for other weights than the step's own.

        Returns:
            The images that were written, without the contact sheet.
        """
        preview = self.config.preview
        with context:
            latents = [
                sample_latents(
                    unet,
                    self.folder,
                    self.prompts,
                    self.empty,
                    seeds=[noise_seed(text, preview.seed) for text in self.texts],
                    height=height,
                    width=width,
                    steps=preview.steps,
                    guidance=preview.guidance,
                    batch_size=1,
                    poll=self.poll,
                )
                for height, width in self.sizes
            ]
        if not main:
            return []
        vae = use_tiles(self.folder.load_vae(torch.float32).to(self.device))
        target, written = step_folder(self.config, step), []
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            single = (latent for size in latents for latent in torch.split(size, 1))
            for (index, _, name), latent in zip(jobs(self.config, self.sizes, what), single, strict=True):
                self.poll_alone()
                (image,) = decode_latents(vae, latent, batch_size=1)
                save(image, target / name, self.config, index, step)
                written.append(target / name)
            write_contact_sheet(self.config, self.sizes)
        del vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # frees decoding's memory for the rest of the step
        return written
