"""A diffusers SDXL pipeline folder: checked before anything is loaded, loaded part by part.

Only safetensors weights are read, never pickled ones. A folder that holds only `*.fp16.safetensors` files, or
another variant's, works: the variant is found per component.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mapo_fast.models.configs import (
    LEGACY_EOS,
    SPECIAL_TOKENS,
    PipelineConfig,
    TextConfig,
    VaeConfig,
    check_schedule,
    check_text,
    check_tokens,
    check_unet,
    check_vae,
    checked,
)
from mapo_fast.models.sdxl import CONFIGS, WEIGHTS, Component, Which, text_encoder
from mapo_fast.models.trial import Shapes, try_text_encoder, try_unet, try_vae
from mapo_fast.settings.schema import TrainConfig
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.files import one_line, read_json, sha256_file, unreadable
from mapo_fast.util.tensorheader import read_header, weights_digest


@dataclass(frozen=True)
class PipelineFolder:
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
        return read_json(self.path(component) / CONFIGS[component])

    @cached_property
    def vae_config(self) -> VaeConfig:
        """The VAE's config, checked."""
        return check_vae(self.config("vae"), self.path("vae") / CONFIGS["vae"])

    def text_config(self, which: Which) -> TextConfig:
        """A text encoder's config, checked."""
        component = text_encoder(which)
        return check_text(self.config(component), self.path(component) / CONFIGS[component])

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """`scheduler/scheduler_config.json`: betas, prediction type, zero-terminal-SNR flag."""
        return {**self.config("scheduler"), **self.scheduler_overrides}

    @cached_property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the pipeline uses zero embeddings for the unconditional prompt (SDXL's default)."""
        return bool(read_json(self.root / "model_index.json").get("force_zeros_for_empty_prompt", True))

    def weight_files(self, component: Component) -> list[Path]:
        """The safetensors files of a component, of the variant that `_variant` chooses."""
        return _weight_files(self.path(component), WEIGHTS[component])[0]

    def fingerprint(self, components: tuple[Component, ...]) -> str:
        """SHA-256 over the configs and weights of these components: the identity of what they compute.

        Of weights, only a sample is read (`weights_digest`), so that a start takes no minute. Two models of
        one architecture differ in it unless somebody changed a few values in the middle of a tensor by hand.
        """
        digest = hashlib.sha256()
        for component in components:
            if component in WEIGHTS:
                files = [self.path(component) / CONFIGS[component], *self.weight_files(component)]
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

    def load_text_encoder(self, which: Which, dtype: torch.dtype = torch.float32) -> Any:
        """The first (`CLIPTextModel`) or second (`CLIPTextModelWithProjection`) text encoder."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        # transformers also follows adapters, quantisation, kernels and other weights that a folder names.
        component: Component = "text_encoder" if which == 1 else "text_encoder_2"
        config = CLIPTextConfig(**self.text_config(which).model_dump())
        kind = CLIPTextModel if which == 1 else CLIPTextModelWithProjection
        return self._load(component, kind, dtype, config).requires_grad_(False)

    def load_tokenizer(self, which: Which) -> Any:
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
        self._check_tokens(which, tokenizer)
        return tokenizer

    def _check_tokens(self, which: Which, tokenizer: Any) -> None:
        """That every prompt can be padded, and that the text encoder knows the tokens."""
        component: Component = "tokenizer" if which == 1 else "tokenizer_2"
        for name in SPECIAL_TOKENS:
            if getattr(tokenizer, f"{name}_id") is None:
                raise UserError(
                    f"{self.path(component) / CONFIGS[component]} has no {name} that is in the vocabulary: "
                    "prompts cannot be encoded; copy the tokenizer's files from the model again"
                )
        text = self.text_config(which)
        if len(tokenizer) > text.vocab_size:
            raise UserError(
                f"{self.root}: tokenizer {which} has {len(tokenizer)} tokens, its text encoder only "
                f"{text.vocab_size}: the folder mixes parts of different models"
            )
        if which == 2 and text.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
            raise UserError(
                f"{self.root}: text_encoder_2/config.json has eos_token_id = {text.eos_token_id}, its "
                f"tokenizer {tokenizer.eos_token_id}: the pooled embedding would be of another token"
            )

    def _load(self, component: Component, kind: Any, dtype: torch.dtype, config: Any = None) -> Any:
        """A part in `dtype`; with a `config` nothing is read from its folder but the weights."""
        files, variant = _weight_files(self.path(component), WEIGHTS[component])
        try:
            where: dict[str, Any] = {
                "pretrained_model_name_or_path": self.path(component),
                "variant": variant,
            }
            if config is not None:
                weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
                where = {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights}
            with _quiet():
                # Wrong shapes are let through here only to be named below: the libraries' own errors differ.
                model, info = kind.from_pretrained(
                    **where,
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # damaged configs and weights raise many kinds
            raise _unloadable(self.path(component), error) from error
        for problem, keys in ((_LACKS, "missing_keys"), (_OTHER_SHAPE, "mismatched_keys")):
            _refuse(files, problem, [key if isinstance(key, str) else key[0] for key in info[keys]])
        # Of what is left over only layers make another model; some text encoders come with a logit_scale.
        _refuse(files, _MORE, [key for key in info["unexpected_keys"] if ".layers." in key])
        return model.eval()


_LACKS, _OTHER_SHAPE, _MORE = "lacks", "has another shape of", "has more than the model,"


def _refuse(files: list[Path], problem: str, tensors: Iterable[str]) -> None:
    """Raise a `UserError` if there are tensors with this problem."""
    if names := sorted(tensors):
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} weight files)"
        raise UserError(
            f"{where} {problem} the tensor {names[0]} ({len(names)} such in all): it does not belong "
            "to the config.json beside it or is incomplete; copy this part of the model again"
        )


def open_sdxl(
    path: Path,
    vae: Path | None = None,
    scheduler_overrides: dict[str, Any] | None = None,
    *,
    weights: bool = True,
) -> PipelineFolder:
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
    folder = PipelineFolder(path, vae if vae is not None else path / "vae", scheduler_overrides or {})
    if vae is not None:
        with _readable("model.vae", vae):
            if not vae.is_dir():
                raise UserError(f"model.vae not found: {vae} (it must be a diffusers AutoencoderKL folder)")
    for component in CONFIGS:
        if component == "vae" and vae is not None:
            with _readable("model.vae", vae):
                try:
                    _check_part(folder, "vae", weights)
                    _ = folder.vae_config
                except UserError as error:
                    raise UserError(f"model.vae cannot be used: {error}") from None
        else:
            with _readable("model.path", path):
                _check_part(folder, component, weights)  # type: ignore[arg-type]
    _check_configs(folder, weights)
    return folder


def scheduler_overrides(config: TrainConfig) -> dict[str, Any]:
    """The scheduler settings that `[train]` states explicitly."""
    overrides: dict[str, Any] = {}
    if config.prediction != "auto":
        overrides["prediction_type"] = config.prediction
    if config.zero_terminal_snr != "auto":
        overrides["rescale_betas_zero_snr"] = config.zero_terminal_snr == "on"
    return overrides


def _check_part(folder: PipelineFolder, component: Component, weights: bool) -> None:
    """One component's config, and with `weights` its weights or vocabulary."""
    part = folder.path(component)
    if not (part / CONFIGS[component]).is_file():
        raise UserError(f"{folder.root} is not an SDXL pipeline: {part / CONFIGS[component]} is missing")
    config = read_json(part / CONFIGS[component])
    if component in ("tokenizer", "tokenizer_2"):
        check_tokens(config, part / CONFIGS[component])
    if component in WEIGHTS and config.get("quantization_config") is not None:  # chooses code to load with
        raise UserError(
            f"{part / CONFIGS[component]} has a quantization_config: take the model's plain weights, and "
            "adapter.base to quantise them here"
        )
    if component in WEIGHTS and weights:
        _weight_files(part, WEIGHTS[component])
    elif weights and component != "scheduler" and not (part / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (part / name).is_file():
                raise UserError(f"{part} is no complete tokenizer: {part / name} is missing")


def _check_configs(folder: PipelineFolder, weights: bool) -> None:
    """That the parts are SDXL's and fit each other, and with `weights` that their weights' shapes do."""
    from mapo_fast.models.diffusion import Diffusion  # imports diffusers

    def where(component: Component) -> Path:
        return folder.path(component) / CONFIGS[component]

    index = folder.root / "model_index.json"
    if checked(PipelineConfig, read_json(index), index).requires_aesthetics_score:
        raise UserError(
            f"{index} has requires_aesthetics_score = true: this is the SDXL refiner, which "
            "cannot be trained here"
        )
    texts = folder.text_config(1), folder.text_config(2)
    check_unet(
        folder.config("unet"),
        where("unet"),
        texts,
        folder.vae_config.latent_channels,
        folder.path("vae"),
    )
    check_schedule(folder.scheduler_config, where("scheduler"))
    named = read_json(index).get("scheduler")
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        # diffusers samples by the class that the index names, whatever the scheduler's own config says
        check_schedule({**folder.scheduler_config, "_class_name": named[1]}, f"{index} (scheduler)")
    Diffusion(folder.scheduler_config, where("scheduler"))
    width = texts[0].hidden_size + texts[1].hidden_size
    trials: dict[Component, Callable[[str], Shapes]] = {
        "vae": try_vae,
        "unet": lambda config: try_unet(config, width, texts[1].projection_dim),
        "text_encoder": lambda _: try_text_encoder(texts[0].model_dump_json(), 1),
        "text_encoder_2": lambda _: try_text_encoder(texts[1].model_dump_json(), 2),
    }
    for component, trial in trials.items():
        shapes = _try(folder, component, trial)
        if weights:
            _check_shapes(folder, component, shapes)


def _try(folder: PipelineFolder, component: Component, call: Callable[[str], Shapes]) -> Shapes:
    try:
        with _quiet():
            return call(json.dumps(folder.config(component), sort_keys=True))
    except Exception as error:  # the libraries check their configs in many ways, and some not at all
        raise _unloadable(folder.path(component), error) from error


def _check_shapes(folder: PipelineFolder, component: Component, shapes: Shapes) -> None:
    """That the weights are those of the model that the config describes, as far as their headers say.

    Names that differ are judged of the UNet only: the libraries rename those of other parts as they load.
    """
    files = folder.weight_files(component)
    stated = {name: entry.shape for file in files for name, entry in read_header(file).tensors.items()}
    shared = shapes.keys() & stated.keys()
    _refuse(files, _OTHER_SHAPE, [name for name in shared if stated[name] != shapes[name]])
    if component == "unet":
        _refuse(files, _LACKS, shapes.keys() - stated.keys())
        _refuse(files, _MORE, stated.keys() - shapes.keys())


@contextmanager
def _readable(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unreadable(f"{name} = {path}", error) from None


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
    known = one_line(error)
    if isinstance(known, MachineError):
        return known
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot load {folder}: {first}")


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The files of a component's weights, and the variant that they are of."""
    variant = _variant(folder, stem)
    dotted = f".{variant}" if variant else ""
    single = folder / f"{stem}{dotted}.safetensors"
    index = folder / f"{stem}.safetensors.index{dotted}.json"
    if single.is_file():
        if os.path.lexists(index):  # diffusers would load what the index names, unchecked
            raise UserError(f"{folder} has both {single.name} and {index.name}: remove one of them")
        return [single], variant
    if os.path.lexists(single):
        raise UserError(f"{single} is no regular file, or a link to nothing: copy it from the model again")
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(_is_weights(name) for name in named.values()):
        raise UserError(
            f"{index} has no weight_map from tensors to names of .safetensors files: copy it "
            "from the model again"
        )
    names = sorted(set(named.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserError(f"{index} names missing weight files: {', '.join(missing) or 'none at all'}")
    return [folder / name for name in names], variant


_PREFERRED = (None, "fp16", "fp32", "bf16")
_SHARD = re.compile(r"-\d+-of-\d+\.")


def _variant(folder: Path, stem: str) -> str | None:
    """The variant to load: the plain one (None) where there is one, else the first of `_PREFERRED`, else the
    only one.
    """
    of_weights = re.compile(
        rf"{stem}(?:\.([\w.-]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([\w.-]+))?\.json"
    )
    names = [path.name for path in folder.iterdir() if not _SHARD.search(path.name)]
    found = {m[1] or m[2] for name in names if (m := of_weights.fullmatch(name))}
    for variant in _PREFERRED:
        if variant in found:
            return variant
    if len(found) == 1:
        return found.pop()
    if found:
        listed = ", ".join(sorted(str(name) for name in found))
        raise UserError(
            f"{folder} has the weights of several variants ({listed}) and none without a name: rename the "
            f"ones to use to {stem}.safetensors"
        )
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has only pickled .bin weights; convert them to safetensors (nothing is unpickled here)"
        )
    raise UserError(f"{folder} has no weights: {stem}.safetensors is missing")


def _is_weights(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
