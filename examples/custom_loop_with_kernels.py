"""A plain diffusers training loop that uses this project's kernels: the loss, the optimizer and `patch_unet`.

python examples/custom_loop_with_kernels.py --model MODEL --data DATA --out OUT
python examples/custom_loop_with_kernels.py --model MODEL --data DATA --out OUT --objective dpo

Needs the base install, diffusers, transformers, peft and pillow. MODEL is a diffusers SDXL folder, and DATA a
folder with `pairs.jsonl`, one pair a line: {"prompt": "…", "chosen": "a.png", "rejected": "b.png"}.
`mapo-fast train` does more: it keeps the pictures' shapes, fits the step to the card's memory, evaluates on
held-out pairs and resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor

from mapo_fast import MaPOLoss, PreferenceLoss, patch_unet
from mapo_kernels import AdamW8bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Pair(NamedTuple):
    """One encoded pair, on the CPU."""

    chosen: Tensor  # (C, h, w), scaled for the UNet
    rejected: Tensor  # (C, h, w)
    prompt: Tensor  # (S, D)
    pooled: Tensor  # (P,)


@torch.no_grad()
def encode(pipe: Any, folder: Path, side: int) -> list[Pair]:
    """Encode all pairs once, so that training needs neither the VAE nor the text encoders."""

    def latents(name: str) -> Tensor:
        picture = ImageOps.fit(Image.open(folder / name).convert("RGB"), (side, side))
        pixels = pipe.image_processor.preprocess(picture).to(DEVICE)
        return pipe.vae.encode(pixels).latent_dist.mode()[0].cpu() * pipe.vae.config.scaling_factor

    pairs = []
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, _, pooled, _ = pipe.encode_prompt(row["prompt"], do_classifier_free_guidance=False)
        pairs.append(Pair(latents(row["chosen"]), latents(row["rejected"]), prompt[0].cpu(), pooled[0].cpu()))
    return pairs


def train(
    model: Path,
    data: Path,
    out: Path,
    objective: str = "mapo",
    resolution: int = 1024,
    steps: int = 600,
    batch: int = 1,
    lr: float = 1e-5,
) -> list[float]:
    """Train a LoRA, save it in `out` for `pipe.load_lora_weights`, and return the loss of every step."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.unet.to(DTYPE)  # alone: SDXL's VAE overflows in half precision
    pipe.to(DEVICE)
    pairs = encode(pipe, data, resolution)
    unet, schedule = pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config)
    del pipe  # the VAE and the text encoders with it

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(unet, torch.float32)  # bf16 would lose small updates
    factors = [p for p in unet.parameters() if p.requires_grad]
    unet.enable_gradient_checkpointing()
    unet.train()

    patch_unet(unet)  # 1. the fused operators: same parameters, same state dict
    optimizer = AdamW8bit(factors, lr=lr)  # 2. the optimizer
    loss_fn = MaPOLoss() if objective == "mapo" else PreferenceLoss(objective)  # 3. the loss

    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], device=DEVICE)
    losses = []
    for step in range(steps):
        drawn = [pairs[i] for i in torch.randint(len(pairs), (batch,))]
        chosen, rejected, prompt, pooled = (torch.stack(part).to(DEVICE) for part in zip(*drawn, strict=True))

        # The chosen half first, the rejected half second; both halves of a pair share noise and timestep.
        latents = torch.cat([chosen, rejected])
        noise = torch.randn_like(chosen).repeat(2, 1, 1, 1)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (batch,), device=DEVICE).repeat(2)
        noisy = schedule.add_noise(latents, noise, timesteps).to(DTYPE)
        v_prediction = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if v_prediction else noise
        conditions = {
            "encoder_hidden_states": prompt.repeat(2, 1, 1),
            "added_cond_kwargs": {"text_embeds": pooled.repeat(2, 1), "time_ids": sizes.repeat(2 * batch, 1)},
        }

        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE is torch.bfloat16):
            reference = None
            if objective != "mapo":  # the frozen reference is the same UNet with the LoRA switched off
                unet.disable_adapters()
                with torch.no_grad():
                    start = unet(noisy, timesteps, **conditions).sample
                unet.enable_adapters()
                reference = (start.float() - target).square().flatten(1).mean(1)
            prediction = unet(noisy, timesteps, **conditions).sample
        result = loss_fn(prediction, target, reference_errors=reference)

        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss.detach()))
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.4f}")

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(out, unet_lora_layers=layers)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train an SDXL LoRA on preference pairs in a plain loop.")
    parser.add_argument("--model", type=Path, required=True, help="a diffusers SDXL folder")
    parser.add_argument("--data", type=Path, required=True, help="a folder with pairs.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--objective", choices=("mapo", "dpo", "ipo", "hinge"), default="mapo")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=1, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-5)
    train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
