"""An SDXL model whose parts have been found and checked, loaded part by part; make one with `open`.

Only safetensors weights are read, never pickled ones, and every class is fixed: nothing that a model's files
name is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mapo_fast.models.configs import TextConfig, VaeConfig, check_schedule, check_text, check_unet, check_vae
from mapo_fast.models.lora_file import LoraFile
from mapo_fast.models.original import canonical
from mapo_fast.models.parts import Part, quiet, unloadable
from mapo_fast.models.sdxl import Component, Which, text_encoder
from mapo_fast.models.tokenizers import Tokenizers


@dataclass(frozen=True)
class Scheduler:
    """A model's noise schedule, and how it is known."""

    config: dict[str, Any]
    """Contents of `scheduler_config.json`, with the overrides of `[train]` merged in."""
    where: Path
    """The file that holds the config."""
    why: str
    """How the prediction type is known."""
    sampler: str | None = None
    """The scheduler class that a pipeline's index names; diffusers samples with it."""
    stated: bool = True
    """Whether the model's files name the prediction; False where the usual one is assumed."""


@dataclass(frozen=True)
class Pipeline:
    """A validated SDXL model."""

    path: Path
    """The folder or file that the user named."""
    parts: Mapping[str, Part]
    """UNet, VAE and the two text encoders, by component."""
    tokenizers: Tokenizers
    scheduler: Scheduler
    zeros_for_empty_prompt: bool = True
    """Whether the unconditional prompt has zero embeddings (SDXL's default)."""
    remarks: tuple[str, ...] = ()
    """Remarks for the user about the model."""
    start: LoraFile | None = None
    """The LoRA that training goes on from; `parts` have its factors of text encoders, not the UNet's."""

    def where(self, component: Component) -> Path:
        """The folder or file of a part, for messages."""
        return self.parts[component].where

    def config(self, component: Component) -> dict[str, Any]:
        """The config of a part with weights."""
        return self.parts[component].config

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's config: betas, prediction type, zero-terminal-SNR flag; overrides merged in."""
        return self.scheduler.config

    @cached_property
    def vae_config(self) -> VaeConfig:
        """The VAE's config, checked."""
        return check_vae(self.config("vae"), self.parts["vae"].config_file)

    def text_config(self, which: Which) -> TextConfig:
        """A text encoder's config, checked."""
        part = self.parts[text_encoder(which)]
        return check_text(part.config, part.config_file)

    def load_unet(self, dtype: torch.dtype = torch.float32) -> Any:
        """`UNet2DConditionModel` on the CPU in `dtype`, in eval mode."""
        from diffusers import UNet2DConditionModel

        return _load(self.parts["unet"], UNet2DConditionModel, dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """`AutoencoderKL` on the CPU in `dtype`, in eval mode, without gradients."""
        from diffusers import AutoencoderKL

        return _load(self.parts["vae"], AutoencoderKL, dtype).requires_grad_(False)

    def load_text_encoder(self, which: Which, dtype: torch.dtype = torch.float32) -> Any:
        """The first (`CLIPTextModel`) or second (`CLIPTextModelWithProjection`) text encoder."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        part = self.parts[text_encoder(which)]
        config = CLIPTextConfig(**self.text_config(which).model_dump())
        kind: Any = CLIPTextModel if which == 1 else CLIPTextModelWithProjection
        try:
            with quiet():
                with torch.device("meta"):
                    names = {canonical(name): name for name in kind(config).state_dict()}
                weights = {names[name]: tensor for name, tensor in part.load(dtype)}
                # transformers makes the buffers that no file has; nothing that a folder names is followed
                model = kind.from_pretrained(None, config=config, state_dict=weights, torch_dtype=dtype)
        except Exception as error:
            raise unloadable(part.where, error) from error
        return model.eval().requires_grad_(False)

    def load_tokenizer(self, which: Which) -> Any:
        """The tokenizer that goes with text encoder 1 or 2.

        Raises:
            UserError: the tokenizer cannot be loaded or does not fit the text encoder.
        """
        return self.tokenizers.load(which, self.text_config(which))


def _load(part: Part, kind: Any, dtype: torch.dtype) -> Any:
    """Load a diffusers model in `dtype`."""
    try:
        with quiet():
            with torch.device("meta"):
                model = kind.from_config(part.config)
            model.load_state_dict(dict(part.load(dtype)), assign=True)
    except Exception as error:  # damaged weights raise many kinds
        raise unloadable(part.where, error) from error
    return model.eval()


def check_pipeline(model: Pipeline) -> None:
    """Check that the parts are SDXL's and fit each other, and their weights their configs.

    Raises:
        UserError: the message names the part and what does not fit.
    """
    from mapo_fast.models.diffusion import Diffusion  # imports diffusers

    unet, vae, scheduler = model.parts["unet"], model.parts["vae"], model.scheduler
    texts = model.text_config(1), model.text_config(2)
    check_unet(unet.config, unet.config_file, texts, model.vae_config.latent_channels, vae.where)
    check_schedule(scheduler.config, scheduler.where)
    if scheduler.sampler is not None:  # diffusers samples by it, whatever the scheduler's own config says
        index = f"{scheduler.where.parent.parent / 'model_index.json'} (scheduler)"
        check_schedule({**scheduler.config, "_class_name": scheduler.sampler}, index)
    Diffusion(scheduler.config, scheduler.where)
    for part in model.parts.values():
        part.check()
