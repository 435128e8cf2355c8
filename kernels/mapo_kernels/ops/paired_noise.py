"""Noisy latents of preference pairs in one launch; the noise is a function of a key and is never stored.

    x_t = α·x₀ + σ·ε          for the chosen and the rejected sample of a pair, with the same ε, α and σ

Shapes. Chosen and rejected latents are (B, …), usually (B, C, H, W); keys, alphas and sigmas are (B,); the
result is (2B, …), the chosen half first, as a denoiser and `paired_loss` take it. For a DDPM schedule
α = √ᾱ_t and σ = √(1 − ᾱ_t); for flow matching α = 1 − σ.

ε is Philox under the pair's 64-bit key, counted in logical (C, H, W) order, through Box–Muller (`_noise.py`).
So it does not depend on launch, block size, memory layout, position in the batch or number of processes, and
a resumed run draws what the first one would have drawn. The loss can make its target again from the same
keys: `NoiseTarget`. Kernel and torch agree to a few ulps, not bitwise: a GPU's square root and fused products
round differently.

Dtypes. Latents in fp16, bf16, fp32 or fp64; ε is fp32; α·x₀ + σ·ε is fp32 (fp64 for fp64 latents) and is
rounded once, to `out_dtype`. Nothing is saved: there is no gradient. Least traffic: both latents once, both
results once; the kernel moves that, plus 16 bytes per 1024 elements.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rows import FLOATING
from mapo_kernels._triton import jit, tl
from mapo_kernels.hardware import backend
from mapo_kernels.ops._noise import NoiseTarget, normals, normals_torch
from mapo_kernels.ops._pair_checks import as_halves, check_constant, check_keys, check_per_pair
from mapo_kernels.ops._pair_kernels import accumulator, triton_dtype
from mapo_kernels.ops._pair_layout import Halves, Layout, merge_layout, offsets, split_halves

__all__ = ["NoiseTarget", "noise_key", "paired_noise", "paired_noise_epsilon", "paired_noise_reference"]

BLOCK = 1024
"""Elements of a pair that a program handles: two counters a thread with 4 warps."""
WARPS = 4


# --- Kernel ---


@jit
def _noise_kernel(  # type: ignore[no-untyped-def]
    chosen,  # (B, …)
    rejected,
    keys,  # (B,) int64
    alphas,  # (B,)
    sigmas,
    noisy_w,  # chosen half of the result, (B, …)
    noisy_l,
    numel,  # elements of a sample
    chunks,  # programs per pair, BLOCK elements each
    row_x,  # elements between samples
    row_y,
    n0,
    n1,
    n2,
    x0,
    x1,
    x2,
    x3,
    y0,
    y1,
    y2,
    y3,
    ACC: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # indices within a sample need 64 bits
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)
    part = program % chunks
    first = part.to(tl.int64) * BLOCK if WIDE else part * BLOCK
    index = first + tl.arange(0, BLOCK)
    inside = index < numel
    x_offset = pair * row_x + offsets(index, n0, n1, n2, x0, x1, x2, x3, DIMS)
    y_offset = pair * row_y + offsets(index, n0, n1, n2, y0, y1, y2, y3, DIMS)
    alpha = tl.load(alphas + pair).to(ACC)
    noise = normals(tl.load(keys + pair), first, BLOCK).to(ACC) * tl.load(sigmas + pair).to(ACC)
    x = tl.load(chosen + x_offset, mask=inside, other=0.0).to(ACC)
    tl.store(noisy_w + y_offset, (alpha * x + noise).to(noisy_w.dtype.element_ty), mask=inside)
    x = tl.load(rejected + x_offset, mask=inside, other=0.0).to(ACC)
    tl.store(noisy_l + y_offset, (alpha * x + noise).to(noisy_l.dtype.element_ty), mask=inside)


# --- Launcher ---


def _launch(
    latents: Halves, keys: Tensor, alphas: Tensor, sigmas: Tensor, noisy: Halves, layout: Layout
) -> None:
    pairs, numel = latents.chosen.shape[0], latents.chosen[0].numel()
    block = block_size(BLOCK, numel)
    chunks = -(-numel // block)
    with on_device(latents.chosen):
        _noise_kernel[(pairs * chunks,)](
            *latents,
            keys.contiguous(),
            alphas.contiguous(),
            sigmas.contiguous(),
            *noisy,
            numel,
            chunks,
            *layout.rows,
            *layout.sizes,
            *layout.strides[0],
            *layout.strides[1],
            ACC=triton_dtype(accumulator(latents.chosen)),
            DIMS=layout.dims,
            WIDE=numel + block >= 2**31,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,  # its default differs between Triton versions
        )


# --- The same without Triton ---


def _eager(latents: Halves, keys: Tensor, alphas: Tensor, sigmas: Tensor, noisy: Halves) -> None:
    acc = accumulator(latents.chosen)
    sample = tuple(latents.chosen.shape[1:])
    alpha, sigma = (s.to(acc).view(-1, *[1] * len(sample)) for s in (alphas, sigmas))
    noise = sigma * normals_torch(keys, sample).to(acc)
    for x, y in zip(latents, noisy, strict=True):
        y.copy_(alpha * x.to(acc) + noise)


# --- Operator ---


def _empty_noisy(chosen: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(2B, …), channels_last where the latents are."""
    shape = (2 * chosen.shape[0], *chosen.shape[1:])
    last = chosen.ndim == 4 and not chosen.is_contiguous()
    last = last and chosen.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=out_dtype, device=chosen.device, memory_format=memory_format)


@torch.library.custom_op(
    "mapo::paired_noise",
    mutates_args=(),
    schema="(Tensor chosen, Tensor rejected, Tensor keys, Tensor alphas, Tensor sigmas, ScalarType out_dtype)"
    " -> Tensor",
)
def _paired_noise_op(
    chosen: Tensor, rejected: Tensor, keys: Tensor, alphas: Tensor, sigmas: Tensor, out_dtype: torch.dtype
) -> Tensor:
    result = _empty_noisy(chosen, out_dtype)
    latents, noisy = Halves(chosen, rejected), split_halves(result, None)
    layout = None
    if backend(chosen.device).name != "eager":
        layout = merge_layout(latents, noisy, logical=True)
    if layout is None:
        _eager(latents, keys, alphas, sigmas, noisy)
    else:
        _launch(latents, keys, alphas, sigmas, noisy, layout)
    return result


@_paired_noise_op.register_fake
def _(
    chosen: Tensor, rejected: Tensor, keys: Tensor, alphas: Tensor, sigmas: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return _empty_noisy(chosen, out_dtype)


# --- Public functions ---


def noise_key(seed: int, epoch: int | str, pair_id: str) -> int:
    """The 64-bit Philox key of a pair's noise, signed, for an int64 tensor; the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{pair_id}/noise".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def paired_noise(
    chosen_latents: Tensor,
    rejected_latents: Tensor,
    keys: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Noise both halves of B pairs, each pair with its own noise, shared by its two samples.

    Args:
        chosen_latents: (B, …) clean latents x₀; fp16, bf16, fp32 or fp64, any strides.
        rejected_latents: as `chosen_latents`, of the same shape and dtype.
        keys: (B,) int64 on the same device, one `noise_key` per pair.
        alphas: (B,) floating, α of each pair; read on the device.
        sigmas: (B,) floating, σ of each pair.
        out_dtype: of the result; the latents' by default.

    Returns:
        (2B, …) α·x₀ + σ·ε, the chosen half first; channels_last where the chosen latents are.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    as_halves("latents", (chosen_latents, rejected_latents))
    pairs, device = chosen_latents.shape[0], chosen_latents.device
    check_constant("chosen_latents", chosen_latents, device)
    check_constant("rejected_latents", rejected_latents, device)
    check_keys(keys, pairs, device)
    check_per_pair("alphas", alphas, pairs, device)
    check_per_pair("sigmas", sigmas, pairs, device)
    out_dtype = chosen_latents.dtype if out_dtype is None else out_dtype
    if out_dtype not in FLOATING:
        raise TypeError(f"out_dtype: {out_dtype} is not supported; choose fp16, bf16, fp32 or fp64")
    noisy: Tensor = _paired_noise_op(chosen_latents, rejected_latents, keys, alphas, sigmas, out_dtype)
    return noisy


def paired_noise_epsilon(
    keys: Tensor,  # (B,) int64
    shape: tuple[int, ...],  # of a sample
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, *shape), on the keys' device
    """The noise itself, in plain torch: what `paired_noise` adds under these keys, to a few ulps."""
    if keys.ndim != 1 or not len(keys):
        raise ValueError(f"keys: shape {tuple(keys.shape)} is not (B,) with B >= 1")
    check_keys(keys, len(keys), keys.device)
    return normals_torch(keys, tuple(shape)).to(dtype)


def paired_noise_reference(
    chosen_latents: Tensor, rejected_latents: Tensor, keys: Tensor, alphas: Tensor, sigmas: Tensor
) -> Tensor:
    """The definition of `paired_noise`, in fp64 from the fp32 noise."""
    noise = normals_torch(keys, tuple(chosen_latents.shape[1:])).double()
    alpha, sigma = (s.double().view(-1, *[1] * (chosen_latents.ndim - 1)) for s in (alphas, sigmas))
    return torch.cat([alpha * x.double() + sigma * noise for x in (chosen_latents, rejected_latents)])
