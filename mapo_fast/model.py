"""A diffusers SDXL pipeline folder: checked before anything is loaded, loaded part by part.

Only safetensors weights are read, never pickled ones. A folder that holds only `*.fp16.safetensors` files
works: the variant is found per component.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from mapo_fast.errors import UserError
from mapo_fast.files import parse_json, read_json, sha256_file

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
        return read_json(self.path(component) / _CONFIGS[component])

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """`scheduler/scheduler_config.json`: betas, prediction type, zero-terminal-SNR flag."""
        return {**self.config("scheduler"), **self.scheduler_overrides}

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the pipeline uses zero embeddings for the unconditional prompt (SDXL's default)."""
        return bool(read_json(self.root / "model_index.json").get("force_zeros_for_empty_prompt", True))

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
        try:
            with _quiet():
                tokenizer = CLIPTokenizer.from_pretrained(self.path(component), local_files_only=True)
            useless = tokenizer("a").input_ids == tokenizer("b").input_ids
        except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
            raise _unloadable(self.path(component), error) from error
        if useless:
            raise UserError(
                f"{self.path(component)} is no usable tokenizer: it gives 'a' and 'b' the same tokens; copy "
                "its files from the model again"
            )
        return tokenizer

    def _load(self, component: Component, kind: Any, dtype: torch.dtype) -> Any:
        files, variant = _weight_files(self.path(component), _WEIGHTS[component])
        try:
            with _quiet():
                # Wrong shapes are let through here only to be named below: the libraries' own errors differ.
                model, info = kind.from_pretrained(
                    self.path(component),
                    torch_dtype=dtype,
                    variant=variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # damaged configs and weights raise many kinds
            raise _unloadable(self.path(component), error) from error
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} weight files)"
        for problem, keys in (("lacks", "missing_keys"), ("has another shape of", "mismatched_keys")):
            names = sorted(key if isinstance(key, str) else key[0] for key in info[keys])
            if names:
                raise UserError(
                    f"{where} {problem} the tensor {names[0]} ({len(names)} such in all): it does not belong "
                    "to the config.json beside it or is incomplete; copy this part of the model again"
                )
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
            for name, entry in sorted(parse_json(header).items()):
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    for offset in (begin, max(begin, end - sample)):
                        file.seek(start + offset)
                        digest.update(file.read(min(sample, end - offset)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    return digest.hexdigest()


def open_sdxl(
    path: Path,
    vae: Path | None = None,
    scheduler_overrides: dict[str, Any] | None = None,
    *,
    weights: bool = True,
) -> SDXLFolder:
    """Check that `path` is a diffusers SDXL pipeline folder; nothing is loaded.

    Args:
        path: the pipeline folder.
        vae: another VAE folder.
        scheduler_overrides: settings that replace those of the scheduler config.
        weights: False where the configs are enough: files of weights and vocabularies may then be missing.

    Raises:
        UserError: naming the missing or wrong part.
    """
    with _readable("model.path", path):
        if not path.is_dir():
            raise UserError(
                f"model folder not found: {path} (model.path must be a diffusers SDXL pipeline folder)"
            )
        if not (path / "model_index.json").is_file():
            hint = " (a single .safetensors file must be converted with diffusers first)"
            raise UserError(f"{path} is not a diffusers pipeline folder: model_index.json is missing{hint}")
    read_json(path / "model_index.json")
    folder = SDXLFolder(path, vae if vae is not None else path / "vae", scheduler_overrides or {})
    if vae is not None:
        with _readable("model.vae", vae):
            if not vae.is_dir():
                raise UserError(f"model.vae not found: {vae} (it must be a diffusers AutoencoderKL folder)")
    for component in _CONFIGS:
        if component == "vae" and vae is not None:
            with _readable("model.vae", vae):
                try:
                    _check_part(folder, "vae", weights)
                except UserError as error:
                    raise UserError(f"model.vae cannot be used: {error}") from None
        else:
            with _readable("model.path", path):
                _check_part(folder, component, weights)  # type: ignore[arg-type]
    _check_unet(folder)
    return folder


def _check_part(folder: SDXLFolder, component: Component, weights: bool) -> None:
    """One component's config, and with `weights` its weights or vocabulary."""
    part = folder.path(component)
    if not (part / _CONFIGS[component]).is_file():
        raise UserError(f"{folder.root} is not an SDXL pipeline: {part / _CONFIGS[component]} is missing")
    where, config = part / _CONFIGS[component], folder.config(component)
    if component in _WEIGHTS and weights:
        _weight_files(part, _WEIGHTS[component])
    elif weights and component != "scheduler" and not (part / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (part / name).is_file():
                raise UserError(f"{part} is no complete tokenizer: {part / name} is missing")
    if component == "vae":
        widths, channels = config.get("block_out_channels"), config.get("latent_channels")
        if config.get("_class_name") != "AutoencoderKL":
            raise UserError(
                f"{where} has _class_name = {config.get('_class_name')!r}, SDXL needs a VAE of class "
                "'AutoencoderKL'"
            )
        if not isinstance(widths, list) or not widths or not isinstance(channels, int):
            raise UserError(
                f"{where} has block_out_channels = {widths!r}, latent_channels = {channels!r}: a VAE "
                "has a list and a number there"
            )


def _check_unet(folder: SDXLFolder) -> None:
    """That the UNet is SDXL's, and that it takes the VAE's latents and nothing else."""
    unet = folder.config("unet")
    for name, value in (("_class_name", "UNet2DConditionModel"), ("addition_embed_type", "text_time")):
        if unet.get(name) != value:
            raise UserError(
                f"{folder.root} is not an SDXL pipeline: unet/config.json has {name} = {unet.get(name)!r}, "
                f"SDXL has {value!r}"
            )
    channels, latent = unet.get("in_channels"), folder.config("vae")["latent_channels"]
    if channels == 2 * latent + 1:
        raise UserError(
            f"{folder.path('unet')} is an inpainting UNet ({channels} input channels, the VAE's latents have "
            f"{latent}): inpainting models cannot be trained here"
        )
    if channels != latent:
        raise UserError(
            f"{folder.path('unet')} has {channels} input channels, the latents of {folder.path('vae')} have "
            f"{latent}: they do not belong together"
        )


@contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} = {path} cannot be read: {error.strerror or error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and reports from transformers and diffusers; their settings are put back afterwards."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    kinds: tuple[Any, ...] = (of_diffusers, of_transformers)
    before = [(kind.get_verbosity(), kind.is_progress_bar_enabled()) for kind in kinds]
    for kind in kinds:
        kind.set_verbosity_error()
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind, (verbosity, bars) in zip(kinds, before, strict=True):
            kind.set_verbosity(verbosity)
            if bars:
                kind.enable_progress_bar()


def _unloadable(folder: Path, error: Exception) -> UserError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot load {folder}: {first}")


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    for variant in (None, "fp16"):
        dotted = f".{variant}" if variant else ""
        single = folder / f"{stem}{dotted}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise UserError(f"{index} names missing weight files: {', '.join(missing) or 'none at all'}")
            return [folder / name for name in names], variant
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has only pickled .bin weights; convert them to safetensors (nothing is unpickled here)"
        )
    raise UserError(f"{folder} has no weights: {stem}.safetensors is missing")
