"""Build the demo's tiny SDXL: `python -m mapo_fast.demo.build_tiny_sdxl --out DIR`.

Every part of the real architecture is there, only small: two CLIP tokenizers and text encoders (frozen,
random, rescaled so that words stay apart), a VAE with factor 4, and a UNet with text_time conditioning, all
trained from scratch on the drawn world of `world.py`. No weights are downloaded. The VAE also learns random
«dead leaves» images (overlapping discs of any colour and size, which share the statistics of photographs),
so that it encodes photographs usefully although it has never seen one.

Takes several minutes on one CPU core and is deterministic for a seed on one machine. The folder it writes is
shipped as `mapo_fast/demo/assets/tiny-sdxl`; `made.json` in it says how it was made and how well it does.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_fast.demo import world
from mapo_fast.models import sdxl
from mapo_fast.util.files import write_json

WIDTH = 32
"""Width of both text encoders; the UNet's cross-attention reads 2 × WIDTH."""
VOCABULARY = 640
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""SDXL's own scheduler settings."""


def main() -> None:
    """Parse the command line, build, score, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number, other weights")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: give a new folder")
    torch.set_num_threads(args.threads)
    started = time.perf_counter()

    tokenizer = write_tokenizer(args.out / "tokenizer")
    encoders = [text_encoder(tokenizer, projected=which == 2, seed=args.seed + which) for which in (1, 2)]
    vae = train_vae(args.vae_steps, args.seed)
    unet = train_unet(args.unet_steps, args.seed, vae, tokenizer, encoders)
    save_pipeline(args.out, tokenizer, encoders, vae, unet)
    scores = score(args.out)
    write_json(
        args.out / "made.json",
        {
            "command": f"python -m mapo_fast.demo.build_tiny_sdxl --seed {args.seed} --vae-steps "
            f"{args.vae_steps} --unet-steps {args.unet_steps} --threads {args.threads}",
            "scores": scores,
            "unet_parameters": sum(p.numel() for p in unet.parameters()),
            "weights_bytes": sum(p.stat().st_size for p in args.out.rglob("*.safetensors")),
            "seconds": round(time.perf_counter() - started),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    print(json.dumps(scores, indent=1))


def write_tokenizer(folder: Path) -> Any:
    """Write CLIP tokenizer files (byte-pair merges learnt from the world's captions) and load them back."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    captions = sorted({caption for caption, _ in world.captioned_drawings(4000, seed=0)})
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = sorted({word for caption in captions for word in caption.split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    entries = list(dict.fromkeys(entries))
    specials = ["<|startoftext|>", "<|endoftext|>"]
    if len(entries) > VOCABULARY - len(specials):
        raise ValueError(f"{len(entries)} tokens do not fit a vocabulary of {VOCABULARY}")
    entries += [f"<|unused{i}|>" for i in range(VOCABULARY - len(specials) - len(entries))] + specials

    folder.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": specials[0],
        "eos_token": specials[1],
        "unk_token": specials[1],
        "pad_token": specials[1],
    }
    write_json(folder / "tokenizer_config.json", config)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    longest = max(len(tokenizer(word).input_ids) for word in words)
    if longest != 3:
        raise ValueError("a word of the world's captions is more than one token")
    return tokenizer


def text_encoder(tokenizer: Any, projected: bool, seed: int) -> Any:
    """A frozen random CLIP text encoder whose scales keep different captions apart."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "token_embedding" in name:
                parameter.normal_(0, 1.0, generator=generator)
            elif "position_embedding" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return encoder.eval().requires_grad_(False)


def train_vae(steps: int, seed: int) -> Any:
    """Train `AutoencoderKL` on drawings and dead leaves, half and half; sets its scaling factor."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIDE,
    )
    drawings = pixels([drawing for _, drawing in world.captioned_drawings(2048, seed=seed)])
    images = torch.cat([drawings, dead_leaves(2048, seed)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample(generator=generator)).sample
        loss = F.mse_loss(rebuilt, batch) + 0.1 * F.l1_loss(rebuilt, batch) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step}: loss {loss.item():.4f}", flush=True)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0 / encode(vae, drawings).std().item())
    return vae


def train_unet(steps: int, seed: int, vae: Any, tokenizer: Any, encoders: list[Any]) -> Any:
    """Train the UNet by plain denoising with 10 % caption drop; returns the averaged weights."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=world.SIDE // 4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(3, 6),  # numbers of heads, as in SDXL's config
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )
    pairs = world.captioned_drawings(12_288, seed=seed)
    latents = encode(vae, pixels([drawing for _, drawing in pairs])) * vae.config.scaling_factor
    captions = sorted({caption for caption, _ in pairs})
    index = {caption: i for i, caption in enumerate(captions)}
    which = torch.tensor([index[caption] for caption, _ in pairs])
    hidden, pooled = encode_captions(tokenizer, encoders, captions)
    side = (world.SIDE, world.SIDE)
    time_ids = torch.tensor([sdxl.time_ids(side, (0, 0), side)])

    scheduler = DDPMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-2)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    recent = []
    for step in range(steps):
        lr = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randint(len(latents), (64,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(1000, (64,), generator=generator)
        kept = (torch.rand(64, generator=generator) >= 0.1).float()
        prediction = sdxl.predict(
            unet,
            scheduler.add_noise(latents[rows], noise, timesteps),
            timesteps,
            hidden[which[rows]] * kept[:, None, None],
            pooled[which[rows]] * kept[:, None],
            time_ids.expand(64, -1),
        )
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.99, (step + 1) / (step + 10))
            for old, new in zip(average.parameters(), unet.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        recent.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            print(f"unet {step + 1}: loss {np.mean(recent[-100:]):.4f}", flush=True)
    return average


def save_pipeline(out: Path, tokenizer: Any, encoders: list[Any], vae: Any, unet: Any) -> None:
    """Write a plain diffusers SDXL pipeline folder, safetensors only."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(out, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):  # as SDXL has them; newer transformers save another format
        shutil.rmtree(out / name)
        write_tokenizer(out / name)


def score(out: Path) -> dict[str, float]:
    """Reload the pipeline and measure it by the rule: reconstructions, captions with and without colour."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    drawings = [drawing for _, drawing in world.captioned_drawings(256, seed=10_001)]
    with torch.no_grad():
        rebuilt = pipeline.vae(pixels(drawings)).sample
        leaves = dead_leaves(64, seed=10_001)
        leaves_error = F.mse_loss(pipeline.vae(leaves).sample, leaves).item()
    readings = [world.read(i) for i in pipeline.image_processor.postprocess(rebuilt)]
    result = {
        "vae_readable": _share(
            r == world.Reading(d.colour, d.shape) for r, d in zip(readings, drawings, strict=True)
        ),
        "vae_psnr_drawings_db": _psnr(F.mse_loss(rebuilt, pixels(drawings)).item()),
        "vae_psnr_dead_leaves_db": _psnr(leaves_error),
    }
    for kind in (True, False):
        images: list[Any] = []
        for start in range(0, 256, 64):
            images += pipeline(
                [drawing.caption(kind) for drawing in drawings[start : start + 64]],
                height=world.SIDE,
                width=world.SIDE,
                guidance_scale=3.0,
                num_inference_steps=20,
                generator=[torch.Generator().manual_seed(start + i) for i in range(64)],
            ).images
        readings = [world.read(image) for image in images]
        name = "with_colour" if kind else "without_colour"
        result[f"{name}_shape"] = _share(r.shape == d.shape for r, d in zip(readings, drawings, strict=True))
        if kind:
            result["with_colour_colour"] = _share(
                r.colour == d.colour for r, d in zip(readings, drawings, strict=True)
            )
        else:
            for colour in world.COLOURS:
                result[f"without_colour_{colour}"] = _share(r.colour == colour for r in readings)
    return {name: round(value, 3) for name, value in result.items()}


def pixels(drawings: list[world.Drawing]) -> Tensor:
    """Drawn images as (N, 3, 32, 32) in [−1, 1]."""
    arrays = np.stack([np.asarray(drawing.image()) for drawing in drawings])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def dead_leaves(count: int, seed: int) -> Tensor:
    """Random overlapping discs, radius density ∝ r⁻³ (scale-invariant, as natural images); (N, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    fine = 2 * world.SIDE  # two samples per pixel and axis, averaged: soft edges
    ys, xs = np.mgrid[0:fine, 0:fine] + 0.5
    images = np.empty((count, fine, fine, 3), dtype=np.float32)
    for image in images:
        image[:] = rng.uniform(-1, 1, 3)
        base, spread = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.1, 0.7)
        for _ in range(120):
            # Inverse transform of p(r) ∝ r⁻³ on [2, 40] sub-pixels.
            radius = (2.0**-2 - rng.uniform() * (2.0**-2 - 40.0**-2)) ** -0.5
            x, y = rng.uniform(-10, fine + 10, 2)
            inside = (xs - x) ** 2 + (ys - y) ** 2 < radius**2
            shade = rng.normal(0, 0.02) * (xs - x)[inside] + rng.normal(0, 0.02) * (ys - y)[inside]
            image[inside] = base + rng.normal(0, spread, 3) + shade[:, None]
    images = images.reshape(count, world.SIDE, 2, world.SIDE, 2, 3).mean(axis=(2, 4))
    return torch.from_numpy(images).permute(0, 3, 1, 2).clamp(-1, 1).contiguous()


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Posterior means (N, 4, 8, 8), not yet scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 256)])


@torch.no_grad()
def encode_captions(tokenizer: Any, encoders: list[Any], captions: list[str]) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both encoders' penultimate states (N, 77, 64), the second's projection (N, 32)."""
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    (first, _), (second, pooled) = (
        sdxl.encode_text(encoder, ids, which) for encoder, which in zip(encoders, sdxl.BOTH, strict=True)
    )
    assert pooled is not None
    return torch.cat([first, second], dim=-1), pooled


def _share(values: Any) -> float:
    return float(np.mean(list(values)))


def _psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of images in [−1, 1]."""
    return 10 * math.log10(4 / mean_squared_error)


if __name__ == "__main__":
    main()
