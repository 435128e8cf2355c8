"""What text encoders, tokenizers and a VAE compute, as one digest, however their files are named and cut.

Weights count by their canonical names, types, shapes and a sample of their values; configs by the fields that
change what is computed; tokenizers by vocabulary, merges and special tokens. So a pipeline folder has the
digest of any other folder or file with the same weights, whatever saved it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.models.pipeline import PipelineFolder
from mapo_fast.models.sdxl import BOTH, Component, text_encoder
from mapo_fast.util.tensorheader import read_header, samples

_DECODER_ONLY = {"out_channels", "up_block_types", "use_post_quant_conv"}
_TOKEN_ONLY = {"eos_token_id"}  # `load_tokenizer` refuses one that is not the tokenizer's
_LEGACY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in the attention of VAEs that older versions of diffusers wrote."""
_WITHOUT_EFFECT = ("position_ids", "logit_scale")
"""0, 1, 2, …, and the scale of CLIP's contrastive loss: not every file has them."""


class TensorIdentity(NamedTuple):
    """What is known of one tensor of a model."""

    name: str
    """Canonical: as diffusers and transformers call it today, without `text_model.`."""
    dtype: str
    """As safetensors writes it: `F16`, `BF16`, `F32`."""
    shape: tuple[int, ...]
    """Without trailing ones: a 1 × 1 convolution is a linear layer."""
    values: str
    """SHA-256 of its first and last `tensorheader.SAMPLE` bytes."""


def encoders_identity(folder: PipelineFolder) -> str:
    """SHA-256 of what a cache depends on: the VAE, both text encoders, both tokenizers.

    Of weights, only a sample is read, so that a start takes no minute.

    Raises:
        UserError: weights that cannot be read, a tokenizer that cannot be loaded.
    """
    vae = folder.vae_config.model_dump(exclude=_DECODER_ONLY)
    parts: dict[str, Any] = {"vae": [vae, *_tensors(folder, "vae")]}
    for which in BOTH:
        exclude = _TOKEN_ONLY | ({"projection_dim"} if which == 1 else set())
        text = folder.text_config(which).model_dump(exclude=exclude)
        parts[f"text{which}"] = [text, *_tensors(folder, text_encoder(which))]
        parts[f"tokenizer{which}"] = _tokenizer(folder.load_tokenizer(which))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tensors(folder: PipelineFolder, component: Component) -> list[TensorIdentity]:
    return sorted(found for file in folder.weight_files(component) for found in _of_file(file))


def _of_file(file: Path) -> Iterator[TensorIdentity]:
    header = read_header(file)
    for name, sample in samples(header):
        if not name.endswith(_WITHOUT_EFFECT):
            yield tensor_identity(name, header.tensors[name].dtype, header.tensors[name].shape, sample)


def tensor_identity(name: str, dtype: str, shape: Sequence[int], sample: bytes) -> TensorIdentity:
    """A tensor's identity, wherever it comes from.

    Args:
        name: as diffusers and transformers call it, today or in an older version.
        dtype: as safetensors writes it.
        shape: in elements.
        sample: its first and last `tensorheader.SAMPLE` bytes.
    """
    for old, new in _LEGACY.items():
        name = name.replace(old, new)
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    values = hashlib.sha256(sample).hexdigest()
    return TensorIdentity(name.removeprefix("text_model."), str(dtype), tuple(sizes), values)


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "vocabulary": tokenizer.get_vocab(),
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }
