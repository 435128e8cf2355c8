"""Quality cost of a quantised base, or of fp8 in training, and the bytes that it saves.

    python -m bench.quantised_base        prints the rows and writes bench/results/quantised_base.jsonl

Measured on the trained tiny SDXL of the demo, 16 preference pairs of its world at 8 timesteps, LoRA r16:

- `code`: error of the weights alone, ‖W' − W‖ / ‖W‖, for 8-bit codes that were tried; mean over the layers.
- `base`: the whole UNet in bf16 as it trains, fp8 rounded as on a GPU and multiplied in bf16. Error of the
  prediction and of the LoRA gradients against fp32 with dense weights, ‖x' − x‖ / ‖x‖; change of the mean
  denoising error; the margin's change in its own standard deviations; and the share of predictions of which
  image is preferred that stay.
- `full`: a full fine-tune in the same way, its weights in bf16, with `speed.fp8` and without.
- `group`: only these layers stored, linear ones in nf4, convolutions in int8, the rest fp32: error of the
  prediction, and how many weights of the full SDXL they are. `quantise.INT8` and `DENSE` follow from them.
- `sdxl`: layers and bytes of the full SDXL's UNet, from shapes alone.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.environment import environment
from mapo_fast.data.vae_encoder import LatentEncoder
from mapo_fast.demo import world
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.loss import MaPOLoss
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.fp8 import use_fp8
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.models.lora import add_lora
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.patch import patch_unet
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.quantise import DENSE, QuantisedConv2d, QuantisedLinear, quantise_base
from mapo_fast.models.text import encode_prompts
from mapo_kernels.fp8 import from_fp8, to_fp8
from mapo_kernels.weights import dense_weight

RESULTS = Path(__file__).parent / "results" / "quantised_base.jsonl"
TINY = Path(world.__file__).parent / "assets" / "tiny-sdxl"
CPU = torch.device("cpu")
PAIRS, STEPS = 16, (20, 120, 250, 400, 550, 700, 850, 980)
GROUPS: dict[str, Callable[[str], bool]] = {
    "time and add embeddings": lambda name: name.split(".")[0] in ("time_embedding", "add_embedding"),
    "time_emb_proj": lambda name: name.endswith("time_emb_proj"),
    "proj_in, proj_out": lambda name: name.endswith(("proj_in", "proj_out")),
    "self-attention": lambda name: ".attn1." in name,
    "cross-attention": lambda name: ".attn2." in name,
    "feed-forward": lambda name: ".ff." in name,
    "conv_in, conv_out (int8)": lambda name: name in DENSE,
    "convolutions (int8)": lambda name: "conv" in name and name not in DENSE,
}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- 8-bit codes ---


def per_row(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def per_64(weight: Tensor) -> Tensor:
    """int8 with one maximum per 64 neighbours, the last block shorter."""
    flat = weight.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    return per_row(padded).nan_to_num(0.0).flatten()[: len(flat)].view_as(weight)


def dynamic(weight: Tensor) -> Tensor:
    codes, state = bnb.quantize_blockwise(weight.contiguous(), blocksize=64)
    return bnb.dequantize_blockwise(codes, state)  # type: ignore[no-any-return]


def nf4(weight: Tensor) -> Tensor:
    codes, state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state)  # type: ignore[no-any-return]


def code_rows(unet: Any) -> Iterator[dict[str, Any]]:
    stored = quantised_weights(unet)
    for kind, shape in (("convolution", 4), ("linear", 2)):
        weights = {name: w for name, w in dense_weights(unet).items() if w.ndim == shape and name in stored}
        codes: dict[str, Callable[[str, Tensor], Tensor]] = {
            "bf16": lambda _, w: w.bfloat16().float(),
            "int8 per output": lambda _, w: per_row(w.flatten(1)).view_as(w),
            "int8 per 64": lambda _, w: per_64(w),
            "dynamic 8-bit per 64": lambda _, w: dynamic(w),
            "as stored": lambda name, _: stored[name],
        }
        if kind == "linear":
            codes |= {
                "fp8": lambda _, w: from_fp8(*to_fp8(w), torch.float32),
                "nf4": lambda _, w: nf4(w),
            }
        for code, make in codes.items():
            errors = [relative(make(name, w), w) for name, w in weights.items()]
            yield {
                "what": "code",
                "layers": kind,
                "code": code,
                "error": sum(errors) / len(errors),
                "largest": max(errors),
            }


def dense_weights(unet: Any) -> dict[str, Tensor]:
    return {
        name: m.weight.detach() for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }


def quantised_weights(unet: Any) -> dict[str, Tensor]:
    """The layers' weights, dequantised to fp32, after `quantise_base(unet, "int8", …)`."""
    stored = copy.deepcopy(unet)
    quantise_base(stored, "int8", CPU)
    return {
        name: dense_weight(m.frozen_weight, torch.float32)
        for name, m in stored.named_modules()
        if isinstance(m, QuantisedLinear | QuantisedConv2d)
    }


# --- The whole UNet ---


def pair_batches(folder: Pipeline) -> list[PairInputs]:
    """One batch of all pairs per timestep, each pair with its own noise."""
    pairs = world.preference_pairs(PAIRS, seed=7)
    encoder = LatentEncoder(folder, "fp32", CPU)
    halves = (encoder([pair[i].image() for pair in pairs]) for i in (1, 2))
    latents = torch.stack([latent for half in halves for latent in half if latent is not None])
    text = encode_prompts(folder, [p for p, *_ in pairs], max_tokens=77, device=CPU, dtype=torch.float32)
    diffusion = Diffusion(folder.scheduler_config)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in STEPS:
        noise = torch.randn(latents[:PAIRS].shape, generator=generator).repeat(2, 1, 1, 1)
        steps = torch.full((2 * PAIRS,), step)
        size = float(world.SIDE)
        found.append(
            PairInputs(
                diffusion.add_noise(latents, noise, steps),
                steps,
                text.prompt_embeds.repeat(2, 1, 1),
                text.pooled_embeds.repeat(2, 1),
                torch.tensor([[size, size, 0, 0, size, size]]).expand(2 * PAIRS, 6),
                diffusion.target(latents, noise, steps),
            )
        )
    return found


def with_adapter(unet: Any) -> Any:
    """Make a LoRA that is no longer zero."""
    add_lora(unet, rank=16, alpha=16.0, targets=("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.01)
    return unet


def measure(unet: Any, batches: list[PairInputs], dtype: torch.dtype) -> dict[str, Tensor]:
    """Predictions, errors per sample and gradients of trained tensors."""
    patch_unet(unet)
    predictions, gradients = [], defaultdict(list)
    for inputs in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            prediction = predict(unet, inputs).float()
        MaPOLoss()(prediction, inputs.target).loss.backward()
        predictions.append(prediction.detach())
        for name, p in unet.named_parameters():
            if p.requires_grad:
                gradients[name].append(p.grad.flatten())
                p.grad = None
    target = torch.stack([inputs.target for inputs in batches])
    both = torch.stack(predictions)
    return {
        "prediction": both,
        "errors": (both - target).square().flatten(2).mean(2),  # (steps, 2 · pairs)
        "gradients": torch.cat([torch.cat(parts) for parts in gradients.values()]),
    }


def base_rows(folder: Pipeline, batches: list[PairInputs]) -> Iterator[dict[str, Any]]:
    want = measure(with_adapter(folder.load_unet()), batches, torch.float32)
    for base in ("dense", "int8", "fp8", "nf4"):
        unet = folder.load_unet(torch.bfloat16)
        if base != "dense":
            quantise_base(unet, base, CPU)  # type: ignore[arg-type]
        got = measure(with_adapter(unet), batches, torch.bfloat16)
        yield {"what": "base", "base": base, **differences(got, want)}


def full_rows(folder: Pipeline, batches: list[PairInputs]) -> Iterator[dict[str, Any]]:
    want = measure(folder.load_unet().requires_grad_(True), batches, torch.float32)
    for fp8 in (False, True):
        unet = folder.load_unet(torch.bfloat16).requires_grad_(True)
        if fp8:
            use_fp8(unet)
        yield {"what": "full", "fp8": fp8, **differences(measure(unet, batches, torch.bfloat16), want)}


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    moved, margin = (
        found["errors"][:, PAIRS:] - found["errors"][:, :PAIRS] for found in (got, want)
    )  # rejected − chosen
    return {
        "prediction_error": relative(got["prediction"], want["prediction"]),
        "gradient_error": relative(got["gradients"], want["gradients"]),
        "denoising_error_change": float(got["errors"].mean() / want["errors"].mean() - 1),
        "margin_change_in_deviations": float((moved - margin).std() / margin.std()),
        "same_preference": float((moved.sign() == margin.sign()).float().mean()),
    }


def group_rows(folder: Pipeline, batches: list[PairInputs]) -> Iterator[dict[str, Any]]:
    def predictions(unet: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([predict(unet, inputs) for inputs in batches])

    unet = folder.load_unet()
    want = predictions(unet)
    stored = {name: nf4(w) if w.ndim == 2 else w for name, w in quantised_weights(unet).items()}
    with torch.device("meta"):
        full = dense_weights(UNet2DConditionModel(**SDXL_UNET))
    outside = {name: getattr(unet, name) for name in DENSE}
    stored |= {
        name: per_row(layer.weight.detach().flatten(1)).view_as(layer.weight)
        for name, layer in outside.items()
    }
    for group, belongs in GROUPS.items():
        changed = copy.deepcopy(unet)
        for name, weight in stored.items():
            if belongs(name):
                changed.get_submodule(name).weight.data = weight
        yield {
            "what": "group",
            "layers": group,
            "prediction_error": relative(predictions(changed), want),
            "sdxl_weights": sum(w.numel() for name, w in full.items() if belongs(name)),
        }


def sdxl_rows() -> Iterator[dict[str, Any]]:
    for base in ("int8", "fp8", "nf4"):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(**SDXL_UNET).to(torch.bfloat16)
        total = sum(p.nbytes for p in unet.parameters())
        kinds = defaultdict(list)
        for layer in quantise_base(unet, base, CPU):  # type: ignore[arg-type]
            kinds[layer.kind].append(layer)
        after = sum(t.nbytes for t in (*unet.parameters(), *unet.buffers()))
        yield {"what": "sdxl", "base": base, "unet_mib_bf16": total / 2**20, "unet_mib": after / 2**20} | {
            kind: {
                "layers": len(layers),
                "mib_bf16": sum(q.dense_bytes for q in layers) / 2**20,
                "mib": sum(q.stored_bytes for q in layers) / 2**20,
            }
            for kind, layers in kinds.items()
        }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure everything, print the rows and write the results file."""
    torch.manual_seed(0)
    folder = open_sdxl(TINY)
    batches = pair_batches(folder)
    stamp = environment()
    rows = [
        *code_rows(folder.load_unet()),
        *base_rows(folder, batches),
        *full_rows(folder, batches),
        *group_rows(folder, batches),
        *sdxl_rows(),
    ]
    with RESULTS.open("w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(rounded(row)))
            file.write(json.dumps({**rounded(row), "environment": stamp}) + "\n")


if __name__ == "__main__":
    main()
