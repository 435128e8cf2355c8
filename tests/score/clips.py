"""Small random CLIP models in both layouts, and OpenCLIP's forward pass written out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, LENGTH, WIDTH, VISION, PROJECTION, PATCH, SIDE, LAYERS, HEADS = (
    49408,
    77,
    64,
    128,
    32,
    8,
    32,
    2,
    (1, 2),
)


def open_clip_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by OpenCLIP's names."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.05) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    state = {
        "logit_scale": torch.tensor(3.0),
        "token_embedding.weight": draw(VOCABULARY, WIDTH, scale=0.5),
        "positional_embedding": draw(LENGTH, WIDTH, scale=0.5),
        "text_projection": draw(WIDTH, PROJECTION, scale=0.2),
        "visual.class_embedding": draw(VISION, scale=0.5),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, VISION, scale=0.5),
        "visual.conv1.weight": draw(VISION, 3, PATCH, PATCH),
        "visual.proj": draw(VISION, PROJECTION, scale=0.2),
    }
    for prefix, width in (("", WIDTH), ("visual.", VISION)):
        for i in range(LAYERS):
            layer = f"{prefix}transformer.resblocks.{i}"
            state[f"{layer}.attn.in_proj_weight"] = draw(3 * width, width, scale=0.2)
            state[f"{layer}.attn.in_proj_bias"] = draw(3 * width)
            state[f"{layer}.attn.out_proj.weight"] = draw(width, width, scale=0.2)
            state[f"{layer}.attn.out_proj.bias"] = draw(width)
            state[f"{layer}.mlp.c_fc.weight"], state[f"{layer}.mlp.c_fc.bias"] = (
                draw(4 * width, width),
                draw(4 * width),
            )
            state[f"{layer}.mlp.c_proj.weight"], state[f"{layer}.mlp.c_proj.bias"] = (
                draw(width, 4 * width),
                draw(width),
            )
            for norm in ("ln_1", "ln_2"):
                state[f"{layer}.{norm}.weight"], state[f"{layer}.{norm}.bias"] = 1 + draw(width), draw(width)
    for norm, width in (("ln_final", WIDTH), ("visual.ln_pre", VISION), ("visual.ln_post", VISION)):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + draw(width), draw(width)
    return state


def _blocks(x: Tensor, state: dict[str, Tensor], prefix: str, heads: int, mask: Tensor | None) -> Tensor:
    for i in range(LAYERS):
        layer = f"{prefix}transformer.resblocks.{i}"

        def norm(x: Tensor, name: str, layer: str = layer) -> Tensor:
            weight, bias = state[f"{layer}.{name}.weight"], state[f"{layer}.{name}.bias"]
            return F.layer_norm(x, weight.shape, weight, bias)

        h = norm(x, "ln_1").transpose(0, 1)
        h = F.multi_head_attention_forward(
            h, h, h, x.shape[-1], heads, state[f"{layer}.attn.in_proj_weight"],
            state[f"{layer}.attn.in_proj_bias"], None, None, False, 0.0,
            state[f"{layer}.attn.out_proj.weight"], state[f"{layer}.attn.out_proj.bias"],
            need_weights=False, attn_mask=mask, training=False,
        )[0].transpose(0, 1)  # fmt: skip
        x = x + h
        h = F.linear(norm(x, "ln_2"), state[f"{layer}.mlp.c_fc.weight"], state[f"{layer}.mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(h), state[f"{layer}.mlp.c_proj.weight"], state[f"{layer}.mlp.c_proj.bias"])
    return x


def open_clip_image(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Normalised embeddings of pixels (n, 3, SIDE, SIDE)."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + state["visual.positional_embedding"]
    )
    x = F.layer_norm(x, (VISION,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = _blocks(x, state, "visual.", HEADS[1], None)[:, 0]
    x = F.layer_norm(x, (VISION,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return F.normalize(x @ state["visual.proj"], dim=-1)


def open_clip_text(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Normalised embeddings of tokens (n, LENGTH), padded by zeros as OpenCLIP does."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    x = _blocks(x, state, "", HEADS[0], mask)
    x = F.layer_norm(x, (WIDTH,), state["ln_final.weight"], state["ln_final.bias"])
    x = x[torch.arange(len(x)), ids.argmax(dim=-1)] @ state["text_projection"]
    return F.normalize(x, dim=-1)


def write_transformers(folder: Path, seed: int = 0, activation: str = "quick_gelu") -> Path:
    """A folder of transformers' `CLIPModel` with random weights."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": LAYERS, "hidden_act": activation, "projection_dim": PROJECTION}
    config = CLIPConfig(
        text_config={**sizes, "hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4,
                     "eos_token_id": 49407},
        vision_config={**sizes, "hidden_size": VISION, "intermediate_size": 256, "num_attention_heads": 4,
                       "image_size": SIDE, "patch_size": PATCH},
        projection_dim=PROJECTION,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CLIPModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder
