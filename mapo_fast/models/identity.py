"""Digests of what a model's parts compute, independent of how their files are named and split.

Weights count by their canonical names, types, shapes and a sample of their values; configs by the fields that
change what is computed; tokenizers by vocabulary, merges and special tokens. So a pipeline folder has the
digest of any other folder or file with the same weights, whichever program saved it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from mapo_fast.models.configs import UnetConfig, checked, per_block
from mapo_fast.models.parts import Part, without_trailing_ones
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.recognise import IGNORED
from mapo_fast.models.sdxl import BOTH, WEIGHTS, Component, text_encoder
from mapo_fast.models.weight_files import weight_files
from mapo_fast.util.files import sha256_file
from mapo_fast.util.tensorheader import weights_digest

_DECODER_ONLY = {"out_channels", "up_block_types", "use_post_quant_conv"}
_TOKEN_ONLY = {"eos_token_id"}  # `load_tokenizer` refuses one that is not the tokenizer's


class TensorIdentity(NamedTuple):
    """Identity of one tensor of a model."""

    name: str
    """Canonical name: diffusers' and transformers' current one, without `text_model.`."""
    dtype: str
    """Type in safetensors' notation: `F16`, `BF16`, `F32`."""
    shape: tuple[int, ...]
    """Shape without trailing ones: a 1 × 1 convolution is a linear layer."""
    values: str
    """SHA-256 of its first and last `tensorheader.SAMPLE` bytes."""


def encoders_identity(model: Pipeline) -> dict[str, str]:
    """SHA-256 of what a cache depends on: `vae`, and `text` for both text encoders and tokenizers.

    Hashes a sample of each tensor, so start-up is fast; can miss edits inside a tensor.

    Raises:
        UserError: weights that cannot be read, a tokenizer that cannot be loaded.
    """
    return {"vae": _digest(_vae(model)), "text": _digest(_text(model))}


def joint_identity(model: Pipeline) -> str:
    """SHA-256 of VAE, text encoders and tokenizers together: caches of format 4 identify their model by it.

    Raises:
        UserError: weights that cannot be read, a tokenizer that cannot be loaded.
    """
    return _digest(_vae(model) | _text(model))


def unet_identity(model: Pipeline) -> str:
    """SHA-256 of what a run starts from: the UNet's weights, by a sample, its config, and the start LoRA.

    Raises:
        UserError: weights that cannot be read.
    """
    part = model.parts["unet"]
    config = per_block(checked(UnetConfig, part.config, part.config_file).model_dump())
    start = {} if model.start is None else model.start.parts["unet"]
    goes_on = [["start", name, start[name].identity()] for name in sorted(start)]
    return _digest([config, *_tensors(part), *goes_on])


def files_fingerprint(model: Pipeline, components: Sequence[Component]) -> str | None:
    """SHA-256 over the files of these components with their names: the identity in older formats.

    Caches of formats 2 and 3, and runs made with them, have it. None where a component is not a folder, or
    has a LoRA added, which its files do not show.
    """
    digest = hashlib.sha256()
    for component in components:
        if component in WEIGHTS:
            part = model.parts[component]
            started = component == "unet" and model.start is not None
            if not part.where.is_dir() or part.added or started:
                return None
            files = [part.config_file, *weight_files(part.where, WEIGHTS[component])]
        else:
            if model.tokenizers.root is None:
                return None
            files = sorted(p for p in (model.tokenizers.root / component).iterdir() if p.is_file())
        for file in files:
            content = weights_digest(file) if file.suffix == ".safetensors" else sha256_file(file)
            digest.update(f"{component}/{file.name}:{content}".encode())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _vae(model: Pipeline) -> dict[str, Any]:
    vae = model.vae_config.model_dump(exclude=_DECODER_ONLY)
    return {"vae": [vae, *_tensors(model.parts["vae"])]}


def _text(model: Pipeline) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for which in BOTH:
        exclude = _TOKEN_ONLY | ({"projection_dim"} if which == 1 else set())
        text = model.text_config(which).model_dump(exclude=exclude)
        parts[f"text{which}"] = [text, *_tensors(model.parts[text_encoder(which)])]
        parts[f"tokenizer{which}"] = _tokenizer(model.load_tokenizer(which))
    return parts


def _tensors(part: Part) -> list[Any]:
    stored = sorted(
        TensorIdentity(name, stored.dtype, without_trailing_ones(stored.shape), stored.digest())
        for name, stored in part.stored.items()
        if not IGNORED.fullmatch(name)
    )
    added = [[name, [one.identity() for one in part.added[name]]] for name in sorted(part.added)]
    return [*stored, *added]


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "vocabulary": tokenizer.get_vocab(),
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }
