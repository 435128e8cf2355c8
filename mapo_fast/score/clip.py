"""CLIP models as scorers use them: built from the shapes of their weights, never from code that they name.

Two layouts are read: transformers' `CLIPModel`, and OpenCLIP's. Both become a `CLIPModel`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mapo_fast.models.tokenizers import clip_tokenizer
from mapo_fast.score.weights import read_weights
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of CLIP's training images by channel (Radford et al., arXiv 2103.00020; OpenCLIP)."""

_VISION_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Channels of a head by width: ViT-H, g and bigG have 80, 88 and 104. All others have 64."""
_EOS = 49407


class Clip:
    """A CLIP model with its preprocessing.

    Args:
        state: tensors by transformers' names.
        activation: of its MLPs: `gelu`, or `quick_gelu` for OpenAI's weights.
        heads: attention heads of text and vision, where the widths do not tell.
        where: the file, for messages.
    """

    def __init__(
        self, state: dict[str, Tensor], activation: str, heads: tuple[int, int] | None, where: Path
    ) -> None:
        from transformers import CLIPModel

        config = _config(state, activation, heads, where)
        with torch.device("meta"):
            self.model: Any = CLIPModel(config)
        missing, unexpected = self.model.load_state_dict(state, strict=False, assign=True)
        unexpected = [name for name in unexpected if not name.endswith("position_ids")]
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which CLIP has not"
            raise UserError(f"{where} is no CLIP model: it {what}")
        for tower in (self.model.text_model, self.model.vision_model):
            embeddings = tower.embeddings  # a buffer that is not stored
            count = embeddings.position_embedding.num_embeddings
            embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
        self.model.eval().float()
        self.size: int = config.vision_config.image_size
        self.length: int = config.text_config.max_position_embeddings
        self._tokenizer = clip_tokenizer(1)

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Tensor:
        """Normalised embeddings (n, D), fp32."""
        pixels = torch.stack([preprocess(image, self.size) for image in images])
        return _normalised(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Normalised embeddings (n, D), fp32; longer prompts are cut at the context's end."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.device)
        return _normalised(self.model.get_text_features(input_ids=ids))

    def cosines(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image with its prompt, (n,) float32."""
        products = (self.images(images) * self.texts(prompts)).sum(dim=1)
        return products.float().cpu().numpy().astype(np.float32)

    @property
    def scale(self) -> float:
        """The factor of CLIP's own logits, exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())


def read_clip(path: Path) -> tuple[Clip, str]:
    """A CLIP model from its weights, and their SHA-256.

    Args:
        path: a folder of transformers (`config.json`, `model.safetensors`), or a file in transformers' or
            OpenCLIP's layout. Of a file the activation follows from the layout: OpenCLIP's is `gelu`.

    Raises:
        UserError: it is no CLIP model.
    """
    state, digest = read_weights(path)
    if "visual.conv1.weight" in state:
        return Clip(_from_open_clip(state, path), "gelu", None, path), digest
    activation, heads = _stated(path)
    return Clip(state, activation, heads, path), digest


def preprocess(image: Image, size: int) -> Tensor:
    """(3, size, size) fp32: RGB, shorter side bicubic to `size`, centre crop, CLIP's mean and deviation."""
    from PIL import Image as Pillow

    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((width * size // short, height * size // short), Pillow.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normalised = (pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1).contiguous()


def _normalised(found: Any) -> Tensor:
    """The embedding itself: transformers 5 wraps it in an object."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _stated(path: Path) -> tuple[str, tuple[int, int] | None]:
    """Activation and numbers of heads of a transformers folder; OpenAI's activation by default."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return "quick_gelu", None
    found = read_json(file)
    towers = [found.get(f"{name}_config") for name in ("text", "vision")] if isinstance(found, dict) else []
    known = [tower if isinstance(tower, dict) else {} for tower in towers] or [{}, {}]
    activation = known[1].get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"{file}: hidden_act = {activation!r} is not CLIP's: 'gelu' or 'quick_gelu'")
    text, vision = (tower.get("num_attention_heads") for tower in known)
    if isinstance(text, int) and isinstance(vision, int) and 0 < text < 1000 and 0 < vision < 1000:
        return activation, (text, vision)
    return activation, None


def _config(state: dict[str, Tensor], activation: str, heads: tuple[int, int] | None, where: Path) -> Any:
    from transformers import CLIPConfig

    try:
        vocabulary, text = state["text_model.embeddings.token_embedding.weight"].shape
        length = state["text_model.embeddings.position_embedding.weight"].shape[0]
        vision, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
        projection = state["text_projection.weight"].shape[0]
        wide = [state[f"{t}_model.encoder.layers.0.mlp.fc1.weight"].shape[0] for t in ("text", "vision")]
    except (KeyError, ValueError) as error:
        raise UserError(f"{where} is no CLIP model: it lacks {error}") from None
    side = round((positions - 1) ** 0.5)
    text_heads, vision_heads = heads or (max(1, text // 64), _VISION_HEADS.get(vision, max(1, vision // 64)))
    shared = {"hidden_act": activation, "projection_dim": projection}
    return CLIPConfig(
        text_config={
            **shared,
            "vocab_size": vocabulary,
            "hidden_size": text,
            "intermediate_size": wide[0],
            "num_hidden_layers": _layers(state, "text"),
            "num_attention_heads": text_heads,
            "max_position_embeddings": length,
            "eos_token_id": min(_EOS, vocabulary - 1),
        },
        vision_config={
            **shared,
            "hidden_size": vision,
            "intermediate_size": wide[1],
            "num_hidden_layers": _layers(state, "vision"),
            "num_attention_heads": vision_heads,
            "image_size": side * patch,
            "patch_size": patch,
        },
        projection_dim=projection,
    )


def _layers(state: dict[str, Tensor], tower: str) -> int:
    layer = re.compile(rf"{tower}_model\.encoder\.layers\.(\d+)\.")
    return 1 + max(int(match[1]) for name in state if (match := layer.match(name)))


_OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_OPEN_CLIP_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_OPEN_CLIP_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _from_open_clip(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """OpenCLIP's tensors by transformers' names: q, k and v apart, projections transposed."""
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in _OPEN_CLIP:
            found[_OPEN_CLIP[name]] = tensor
        elif module in _OPEN_CLIP_NORMS:
            found[f"{_OPEN_CLIP_NORMS[module]}.{kind}"] = tensor
        elif name in ("text_projection", "visual.proj"):
            ours = "text_projection" if name == "text_projection" else "visual_projection"
            found[f"{ours}.weight"] = tensor.T.contiguous()
        elif layer := _OPEN_CLIP_LAYER.fullmatch(name):
            found |= _open_clip_layer(layer, tensor)
        elif name != "attn_mask":
            raise UserError(f"{where} is no OpenCLIP model with a vision transformer: it has {name}")
    return found


def _open_clip_layer(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
    module, _, kind = match[3].rpartition(".")
    if match[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = match[3].rpartition("_")[2]
        parts = tensor.chunk(3)
        return {f"{layer}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
    return {f"{layer}.{_LAYER.get(module, module)}.{kind}": tensor}
