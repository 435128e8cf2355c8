"""The parts of a model with weights, each from a folder of its own or out of a single file.

A `Part` knows its config and where each of its tensors lies, under the names that diffusers and transformers
use today; nothing is loaded. Names, shapes and types are compared with those of the model that the config
describes, built on tensors without data (`trial`): a file that is cut short, or is another model's, is named
with the first key that is wrong, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from mapo_fast.models.configs import TextConfig, UnetConfig, VaeConfig, per_block
from mapo_fast.models.from_shapes import CONFIGS_FROM, MissingKeyError
from mapo_fast.models.original import canonical, places
from mapo_fast.models.recognise import IGNORED
from mapo_fast.models.sdxl import CONFIGS, WEIGHTS, pooled_width
from mapo_fast.models.stored import FLOATS, StoredTensor, placed, rounded, whole
from mapo_fast.models.trial import Shapes, try_text_encoder, try_unet, try_vae
from mapo_fast.models.weight_files import weight_files
from mapo_fast.util.errors import MachineError, UserError, shown
from mapo_fast.util.files import one_line, parse_json, read_json
from mapo_fast.util.tensorheader import Header, read_header

CONFIGS_KEY = "mapo_fast.configs"
"""Metadata of a single file: JSON of the fields, by part, that its shapes do not tell (`from_shapes`)."""

_FIELDS = {
    "unet": {*UnetConfig.model_fields, "use_linear_projection", "sample_size"},
    "vae": {*VaeConfig.model_fields, "force_upcast", "sample_size"},
    "text_encoder": {*TextConfig.model_fields} - {"eos_token_id", "projection_dim"},
    "text_encoder_2": {*TextConfig.model_fields} - {"eos_token_id"},
}
"""The fields that this metadata may have."""


class Added(Protocol):
    """A product that can be added to a weight."""

    def product(self, shape: tuple[int, ...], /) -> Tensor:
        """The product, in fp64 and of the weight's shape."""

    def identity(self) -> list[Any]:
        """Everything that the product depends on, for JSON."""


@dataclass(frozen=True)
class Part:
    """A UNet, VAE or text encoder that can be loaded."""

    component: str
    where: Path
    """The part's folder, or the file that holds it."""
    config_file: Path
    config: dict[str, Any]
    stored: Mapping[str, StoredTensor] = field(repr=False)
    """The part's tensors by canonical name; empty where only the config was asked for."""
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Names of tensors in the file, where they differ from the canonical ones."""
    header: Header | None = field(default=None, repr=False)
    """The header of the single file that holds the part."""
    added: Mapping[str, tuple[Added, ...]] = field(default_factory=dict, repr=False)
    """Products of LoRAs to add to tensors, by canonical name."""

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the model that the config describes, by canonical name.

        Raises:
            UserError: a model cannot be built from the config, or cannot be called.
        """
        return _shapes(self.component, self.config, self.where)

    def check(self) -> None:
        """Compare the stored tensors with what the config describes.

        Raises:
            UserError: the message names the first tensor that is missing, unknown, of another shape or type.
        """
        shapes, stored = self.shapes, self.stored
        if not stored:
            return
        self._refuse("lacks", shapes.keys() - stored.keys())
        shared = sorted(shapes.keys() & stored.keys())
        cut = without_trailing_ones
        other = [name for name in shared if cut(stored[name].shape) != cut(shapes[name])]
        self._refuse("has another shape of", other)
        more = stored.keys() - shapes.keys()
        if self.component != "unet":  # only layers make another model; some come with a logit_scale
            more = {name for name in more if ".layers." in name}
        self._refuse("has more than the model,", more)
        for name in shared:
            if (dtype := stored[name].dtype) not in FLOATS:
                raise UserError(
                    f"{stored[name].file} has the tensor {self.keys.get(name, name)} as {dtype}: weights are "
                    f"of type {', '.join(FLOATS)}; quantised ones cannot be trained"
                )

    def _refuse(self, problem: str, names: Iterable[str]) -> None:
        if found := sorted(self.keys.get(name, name) for name in names):
            if self.header is not None:
                where, way_out = (
                    str(self.where),
                    "it is incomplete or another model's; copy or download it again",
                )
            else:
                files = sorted({stored.file for stored in self.stored.values()})
                where = str(files[0]) if len(files) == 1 else f"{self.where} ({len(files)} weight files)"
                way_out = (
                    "it does not belong to the config.json next to it, or is incomplete; copy this part of "
                    "the model again"
                )
            raise UserError(f"{where} {problem} the tensor {found[0]} ({len(found)} such in all): {way_out}")

    def tensors(self) -> Mapping[str, StoredTensor]:
        """The tensors that the model has, by canonical name."""
        return {name: self.stored[name] for name in self.shapes}

    def tensor(self, name: str) -> Tensor:
        """A tensor with the LoRAs added: in its stored type without any, else in fp64, not rounded yet."""
        tensor = self.stored[name].load()
        for added in self.added.get(name, ()):
            tensor = tensor.double() + added.product(tensor.shape)
        return tensor

    def load(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the model by canonical name, on the CPU.

        A tensor that the file has in this type stays a private map of the file: it is read when it is used,
        and writes to it stay in memory.
        """
        for name, shape in self.shapes.items():
            tensor = self.tensor(name)
            kept = tensor if tensor.dtype == dtype else rounded(tensor, dtype)
            yield name, kept.reshape(shape).contiguous()


def folder_part(component: str, folder: Path, *, weights: bool = True) -> Part:
    """A part in its own folder, as diffusers saves it.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    file = folder / CONFIGS[component]
    config = read_json(file)
    if config.get("quantization_config") is not None:  # chooses code to load with
        raise UserError(
            f"{file} has a quantization_config: take the model's plain weights, and adapter.base to quantise "
            "them here"
        )
    files = weight_files(folder, WEIGHTS[component]) if weights else []
    stored = {}
    keys = {}
    for header in map(read_header, files):
        for key, entry in header.tensors.items():
            stored[canonical(key)] = whole(header.path, entry)
            keys[canonical(key)] = key
    return Part(component, folder, file, config, stored, keys)


def file_part(component: str, header: Header, prefix: str) -> Part:
    """A part out of a single file with the original names.

    Args:
        component: name of the part.
        header: the file's header.
        prefix: how the part's keys begin.

    Raises:
        UserError: keys are missing or unknown.
    """
    shapes = {k.removeprefix(prefix): e.shape for k, e in header.tensors.items() if k.startswith(prefix)}
    try:
        config = CONFIGS_FROM[component](shapes)
    except MissingKeyError as error:
        raise UserError(
            f"{header.path} lacks the tensor {prefix}{error.args[0]}, or has it of another shape: it is "
            "incomplete or another model's; copy or download it again"
        ) from None
    config |= _stated(header, component)
    part = Part(component, header.path, header.path, config, {}, {}, header)
    bare = places(component, part.shapes, config)
    found = {name: place._replace(key=prefix + place.key) for name, place in bare.items()}
    stored = {name: placed(header, place) for name, place in found.items() if place.key in header.tensors}
    used = {place.key for place in found.values()}
    keys = {name: place.key for name, place in found.items()}
    for key in sorted(header.tensors.keys() - used):
        if key.startswith(prefix) and not IGNORED.fullmatch(key):
            raise UserError(
                f"{header.path} has the tensor {shown(key)}, which SDXL's {NAMES[component]} does not have: "
                "it is another model's, or of several; take the model's file as it was published"
            )
    return Part(component, header.path, header.path, config, stored, keys, header)


NAMES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder",
    "text_encoder_2": "second text encoder",
}


def renamed_part(like: Part, header: Header) -> Part:
    """A part out of a file with diffusers' names and no config; uses the config of another model's part."""
    stored = {canonical(key): whole(header.path, entry) for key, entry in header.tensors.items()}
    keys = {canonical(key): key for key in header.tensors}
    return Part(like.component, header.path, like.config_file, like.config, stored, keys, header)


def fields_to_state(part: Part, shapes: Shapes) -> dict[str, Any]:
    """The fields of a part's config that its shapes in a single file would not tell (`CONFIGS_KEY`).

    Args:
        part: a part of any model.
        shapes: shapes of its tensors under the original names, without prefix.
    """
    told, has = (
        _normal(part.component, CONFIGS_FROM[part.component](shapes)),
        _normal(part.component, part.config),
    )
    return {name: value for name, value in has.items() if told.get(name) != value}


_MODELS: dict[str, type[BaseModel]] = {
    "unet": UnetConfig,
    "vae": VaeConfig,
    "text_encoder": TextConfig,
    "text_encoder_2": TextConfig,
}


def _normal(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields that change what is computed, with defaults, and one value for each block."""
    fields = {**config, **_MODELS[component].model_validate(dict(config)).model_dump()}
    if component == "unet":
        fields = per_block(fields)
    return {name: fields[name] for name in sorted(_FIELDS[component]) if fields.get(name) is not None}


def _stated(header: Header, component: str) -> dict[str, Any]:
    """The fields of a part's config in a file's metadata.

    Raises:
        UserError: the metadata is not a JSON object, or has unknown fields.
    """
    text = header.metadata.get(CONFIGS_KEY)
    if text is None:
        return {}
    try:
        stated = parse_json(text).get(component, {})
        unknown = stated.keys() - _FIELDS[component]
    except (ValueError, AttributeError):
        raise UserError(
            f"{header.path} has metadata {CONFIGS_KEY} that is not a JSON object of objects"
        ) from None
    if unknown:
        raise UserError(
            f"{header.path} has metadata {CONFIGS_KEY} with the unknown field {shown(min(unknown))}"
        )
    return dict(stated)


def _shapes(component: str, config: Mapping[str, Any], where: Path) -> Shapes:
    text = json.dumps(config, sort_keys=True)
    trials: dict[str, Callable[[], Shapes]] = {
        "vae": lambda: try_vae(text),
        "unet": lambda: try_unet(text, config["cross_attention_dim"], pooled_width(config)),
        "text_encoder": lambda: try_text_encoder(_text(config), 1),
        "text_encoder_2": lambda: try_text_encoder(_text(config), 2),
    }
    try:
        with quiet():
            found = trials[component]()
    except Exception as error:  # the libraries check their configs in many ways, and some not at all
        raise unloadable(where, error) from error
    return {canonical(name): shape for name, shape in found.items() if not IGNORED.fullmatch(name)}


def _text(config: Mapping[str, Any]) -> str:
    return TextConfig.model_validate(dict(config)).model_dump_json()


def without_trailing_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without trailing ones: a 1 × 1 convolution is a linear layer."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


@contextmanager
def quiet() -> Iterator[None]:
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


def unloadable(where: Path | str, error: Exception) -> UserError:
    """The error to raise for a library's exception while a part was built or loaded."""
    known = one_line(error)
    if isinstance(known, MachineError):
        return known
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot load {where}: {first}")
