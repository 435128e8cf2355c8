"""A step of AdamW8bit in plain torch: bitsandbytes' operations in bitsandbytes' order, see `adamw8bit.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mapo_kernels._rounding import random_bits_torch, round_stochastically_torch
from mapo_kernels.ops._adamw8bit_tensors import QUANTISED_BLOCK, Settings, Tensors
from mapo_kernels.ops._dynamic_code import code_book, cpu_code, nearest_code


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a view."""
    return x.as_strided((x.numel(),), (1,))


def _blocks(x: Tensor) -> Tensor:
    """(blocks, 256) of a flat tensor, the last one filled with zeros."""
    missing = -x.numel() % QUANTISED_BLOCK
    return torch.nn.functional.pad(x, (0, missing)).view(-1, QUANTISED_BLOCK)


def _dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """fp32 moments, flat."""
    values = code_book(signed, codes.device)[_blocks(_flat(codes)).int()] * absmax[:, None]
    return values.view(-1)[: codes.numel()]


def _quantise(moments: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Write the codes and block maxima of flat moments."""
    blocks = _blocks(moments.to(torch.float32))
    absmax.copy_(blocks.abs().nan_to_num(0.0, posinf=math.inf).amax(1))
    choose = cpu_code if codes.device.type == "cpu" else nearest_code
    chosen = choose(blocks * (1 / absmax)[:, None], signed)
    chosen = torch.where(absmax[:, None] == 0, 0, chosen)  # as bitsandbytes; 0 · anything is 0
    _flat(codes).copy_(chosen.view(-1)[: codes.numel()])


def eager_step(tensors: Tensors, settings: Settings) -> None:
    """One step in plain torch. It reads the device's scalars, so it waits for the device."""
    lr, b1, b2 = float(settings.lr), settings.beta1, settings.beta2
    flags = [False] if settings.found_inf is None else settings.found_inf.flatten().tolist()
    if len(flags) == 1:
        flags *= len(tensors.params)
    for skip, (p, g, state1, state2, absmax1, absmax2, count, tensor_id) in zip(
        flags, zip(*tensors, strict=True), strict=True
    ):
        if skip:
            continue
        step = int(count.add_(1))
        acc = torch.float64 if p.dtype == torch.float64 else torch.float32
        quantised = state1.dtype == torch.uint8
        grad, weight = _flat(g).to(acc), _flat(p).to(acc)
        if settings.grad_scale is not None:
            grad = grad * (1 / float(settings.grad_scale))
        if quantised:
            m, v = _dequantise(state1, absmax1, True).to(acc), _dequantise(state2, absmax2, False).to(acc)
        else:
            m, v = _flat(state1).to(acc), _flat(state2).to(acc)
        # From here on bitsandbytes' operations in bitsandbytes' order, which differs between the two kinds.
        m.mul_(b1).add_(grad, alpha=1.0 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
        correction1, correction2 = 1.0 - b1**step, math.sqrt(1.0 - b2**step)
        if settings.weight_decay > 0.0:
            weight = weight.mul_(1.0 - lr * settings.weight_decay)
        if quantised:
            size, denominator = -lr / correction1, (v.sqrt() / correction2).add_(settings.eps)
        else:
            size, denominator = -lr * correction2 / correction1, v.sqrt() + settings.eps * correction2
        if settings.max_update_rms is not None and p.numel():
            square = (m / denominator).square().mean(dtype=torch.float64)
            rms = float(square.sqrt()) * (1.0 if quantised else correction2) / correction1
            if rms > settings.max_update_rms:
                size *= settings.max_update_rms / rms
        if quantised:
            weight.addcdiv_(m, denominator, value=size)
            _quantise(m, state1, absmax1, True)
            _quantise(v, state2, absmax2, False)
        else:
            weight.add_(m / denominator, alpha=size)
            _flat(state1).copy_(m)
            _flat(state2).copy_(v)
        if settings.seed is not None and p.dtype in (torch.bfloat16, torch.float16):
            random = random_bits_torch(int(settings.seed), tensor_id, step, p.numel(), p.device)
            weight = round_stochastically_torch(weight, random, p.dtype)
        _flat(p).copy_(weight)
