"""A diffusers SDXL pipeline folder: checked before anything is loaded, loaded part by part.

Only safetensors weights are read, never pickled ones. A folder that holds only `*.fp16.safetensors` files
works: the variant is found per component.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from mapo_fast.errors import UserError
from mapo_fast.files import sha256_file

Component = Literal["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]

_WEIGHTS: dict[str, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_CONFIGS: dict[str, str] = {
    **dict.fromkeys(_WEIGHTS, "config.json"),
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


@dataclass(frozen=True)
class SDXLFolder:
    """A validated diffusers SDXL pipeline folder; make one with `open_sdxl`."""

    root: Path
    vae_root: Path
    scheduler_overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that replace those of `scheduler_config.json`, for training and sampling alike."""

    def path(self, component: Component) -> Path:
        """The component's own folder."""
        return self.vae_root if component == "vae" else self.root / component

    def config(self, component: Component) -> dict[str, Any]:
        """The component's JSON config."""
        return _read_json(self.path(component) / _CONFIGS[component])

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """`scheduler/scheduler_config.json`: betas, prediction type, zero-terminal-SNR flag."""
        return {**self.config("scheduler"), **self.scheduler_overrides}

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the pipeline uses zero embeddings for the unconditional prompt (SDXL's default)."""
        return bool(_read_json(self.root / "model_index.json").get("force_zeros_for_empty_prompt", True))

    def weight_files(self, component: Component) -> list[Path]:
        """The safetensors files of a component, of the plain variant where it exists, else fp16's."""
        return _weight_files(self.path(component), _WEIGHTS[component])[0]

    def fingerprint(self, components: tuple[Component, ...]) -> str:
        """SHA-256 over the configs and weights of these components: the identity of what they compute.

        Of weights, only a sample is read (`weights_digest`), so that a start takes no minute. Two models of
        one architecture differ in it unless somebody changed a few values in the middle of a tensor by hand.
        """
        digest = hashlib.sha256()
        for component in components:
            if component in _WEIGHTS:
                files = [self.path(component) / _CONFIGS[component], *self.weight_files(component)]
            else:
                files = sorted(p for p in self.path(component).iterdir() if p.is_file())
            for file in files:
                content = weights_digest(file) if file.suffix == ".safetensors" else sha256_file(file)
                digest.update(f"{component}/{file.name}:{content}".encode())
        return digest.hexdigest()

    def load_unet(self, dtype: torch.dtype = torch.float32) -> Any:
        """`UNet2DConditionModel` on the CPU in `dtype`, in eval mode."""
        from diffusers import UNet2DConditionModel

        return self._load("unet", UNet2DConditionModel, dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """`AutoencoderKL` on the CPU in `dtype`, in eval mode, without gradients."""
        from diffusers import AutoencoderKL

        return self._load("vae", AutoencoderKL, dtype).requires_grad_(False)

    def load_text_encoder(self, which: Literal[1, 2], dtype: torch.dtype = torch.float32) -> Any:
        """The first (`CLIPTextModel`) or second (`CLIPTextModelWithProjection`) text encoder."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        if which == 1:
            return self._load("text_encoder", CLIPTextModel, dtype).requires_grad_(False)
        return self._load("text_encoder_2", CLIPTextModelWithProjection, dtype).requires_grad_(False)

    def load_tokenizer(self, which: Literal[1, 2]) -> Any:
        """The tokenizer that goes with text encoder 1 or 2."""
        from transformers import CLIPTokenizer

        component: Component = "tokenizer" if which == 1 else "tokenizer_2"
        return CLIPTokenizer.from_pretrained(self.path(component), local_files_only=True)

    def load_scheduler(self, kind: Any) -> Any:
        """A diffusers scheduler class built from this pipeline's scheduler config."""
        return kind.from_config(self.scheduler_config)

    def _load(self, component: Component, kind: Any, dtype: torch.dtype) -> Any:
        variant = _weight_files(self.path(component), _WEIGHTS[component])[1]
        try:
            model = kind.from_pretrained(
                self.path(component),
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot load {self.path(component)}: {first}") from error
        return model.eval()


def weights_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's size, header, and the first and last 4 KiB of every tensor.

    Raises:
        UserError: the file cannot be read as safetensors.
    """
    sample = 4096
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = file.read(length)
            digest.update(header)
            start = 8 + length
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    for offset in (begin, max(begin, end - sample)):
                        file.seek(start + offset)
                        digest.update(file.read(min(sample, end - offset)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    return digest.hexdigest()


def open_sdxl(
    path: Path, vae: Path | None = None, scheduler_overrides: dict[str, Any] | None = None
) -> SDXLFolder:
    """Check that `path` is a diffusers SDXL pipeline folder; nothing is loaded.

    Args:
        path: the pipeline folder.
        vae: another VAE folder.
        scheduler_overrides: settings that replace those of the scheduler config.

    Raises:
        UserError: naming the missing or wrong part.
    """
    if not path.is_dir():
        raise UserError(
            f"model folder not found: {path} (model.path must be a diffusers SDXL pipeline folder)"
        )
    if not (path / "model_index.json").is_file():
        hint = " (a single .safetensors file must be converted with diffusers first)"
        raise UserError(f"{path} is not a diffusers pipeline folder: model_index.json is missing{hint}")
    _read_json(path / "model_index.json")
    folder = SDXLFolder(path, vae if vae is not None else path / "vae", scheduler_overrides or {})
    for component, config in _CONFIGS.items():
        part = folder.path(component)  # type: ignore[arg-type]
        if not (part / config).is_file():
            raise UserError(f"{path} is not an SDXL pipeline: {part / config} is missing")
        _read_json(part / config)
        if component in _WEIGHTS:
            _weight_files(part, _WEIGHTS[component])
    unet = folder.config("unet")
    if unet.get("_class_name") != "UNet2DConditionModel" or unet.get("addition_embed_type") != "text_time":
        raise UserError(
            f"{path} is not an SDXL pipeline: unet/config.json has addition_embed_type = "
            f"{unet.get('addition_embed_type')!r}, SDXL has 'text_time'"
        )
    return folder


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    for variant in (None, "fp16"):
        dotted = f".{variant}" if variant else ""
        single = folder / f"{stem}{dotted}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if index.is_file():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise UserError(f"{index} names missing weight files: {', '.join(missing) or 'none at all'}")
            return [folder / name for name in names], variant
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has only pickled .bin weights; convert them to safetensors (nothing is unpickled here)"
        )
    raise UserError(f"{folder} has no weights: {stem}.safetensors is missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
