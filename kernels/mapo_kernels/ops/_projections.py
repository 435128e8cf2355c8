"""What the operators with a matrix product share: projections, dense or quantised, with or without LoRA.

    y_i = n W_iᵀ + bias_i + scale_i · t_i B_iᵀ        t_i = n A_iᵀ, one (M, r) product per adapter

n is (M, C): an operator's input, or what it makes of its input and makes again in backward. The y_i lie side
by side in one (M, ΣN) buffer. Weights that are rows of one matrix (`views_of_one`) are one product.

    dt_i = scale_i · dy_i B_i          dn = Σ dy_i W_i + Σ dt_i A_i
    dW_i = dy_iᵀ n     dA_i = dt_iᵀ n     dB_i = scale_i · dy_iᵀ t_i     dbias_i = Σ_rows dy_i

Everything is computed in n's dtype: weights and factors are cast, n never is. A gradient has its parameter's
dtype; on CUDA an fp32 one leaves the matrix product in fp32, elsewhere it is rounded to n's dtype first. dn
is accumulated in one buffer: no gradients are concatenated.

Quantised weights are dequantised inside the operator (weights.py), in forward and again in backward, and
never saved. Unlike in bitsandbytes' own int8 layer, activations are not quantised and there are no outlier
columns. fp8 is different: it stays as it is, and n and dy are rounded to it (fp8.py).

Custom operators take tensors, numbers and strings. `pack` turns projections into a list of tensors and one
format each, such as `nf4 640 320 bfloat16 64 256+bias+lora`; `unpack` turns them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mapo_kernels._autocast import autocast_dtype
from mapo_kernels._rows import FLOATING
from mapo_kernels.fp8 import Rows, fp8_input_gradient, fp8_product, to_fp8
from mapo_kernels.weights import FrozenWeight, dense_weight, views_of_one


class Lora(NamedTuple):
    """A low-rank adapter: scale · (n Aᵀ) Bᵀ is added to a projection."""

    a: Tensor
    """(r, C), any floating dtype."""
    b: Tensor
    """(N, r)."""
    scale: float
    """alpha / r in peft's terms."""


class Projection(NamedTuple):
    """One linear layer: weight (N, C), bias (N,) or None, adapter or None."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None = None
    lora: Lora | None = None
    fp8: bool = False
    """Round a dense weight to fp8, and n and dy with it, for y and dn; dW is not rounded."""


# --- Projections as operator arguments ---


def pack(projections: Sequence[Projection]) -> tuple[list[Tensor], list[str], list[float]]:
    """Tensors in order (weight…, bias, A, B of each projection), formats, and LoRA scales (0.0 without)."""
    tensors: list[Tensor] = []
    formats, scales = [], []
    for weight, bias, lora, fp8 in projections:
        if isinstance(weight, FrozenWeight):
            tensors.extend(weight.tensors)
            form = weight.format
        else:
            tensors.append(weight)
            form = "dense+fp8" if fp8 else "dense"
        if bias is not None:
            tensors.append(bias)
            form += "+bias"
        if lora is not None:
            tensors.extend((lora.a, lora.b))
            form += "+lora"
        formats.append(form)
        scales.append(0.0 if lora is None else float(lora.scale))
    return tensors, formats, scales


def _roles(form: str) -> list[str]:
    """What the tensors of one packed projection are: `weight` or several `frozen`, `bias`, `a`, `b`."""
    weight, *parts = form.split("+")
    if weight == "dense":
        found = ["weight"]
    else:
        found = ["frozen"] * (2 if weight.startswith(("int8", "fp8")) or weight.endswith(" 0") else 5)
    if "bias" in parts:
        found.append("bias")
    if "lora" in parts:
        found.extend(("a", "b"))
    return found


def unpack(tensors: Sequence[Tensor], formats: Sequence[str], scales: Sequence[float]) -> list[Projection]:
    """The projections that were packed."""
    projections = []
    rest = iter(tensors)
    for form, scale in zip(formats, scales, strict=True):
        mine = [(role, next(rest)) for role in _roles(form)]
        by_role = dict(mine)
        frozen = tuple(tensor for role, tensor in mine if role == "frozen")
        projections.append(
            Projection(
                FrozenWeight(frozen, form.split("+")[0]) if frozen else by_role["weight"],
                by_role.get("bias"),
                Lora(by_role["a"], by_role["b"], scale) if "a" in by_role else None,
                "+fp8" in form,
            )
        )
    return projections


def widths(projections: Sequence[Projection]) -> list[int]:
    """Output features N of each projection."""
    return [projection.weight.shape[0] for projection in projections]


def total_rank(projections: Sequence[Projection]) -> int:
    """Columns of t: the sum of the adapters' ranks."""
    return sum(p.lora.a.shape[0] for p in projections if p.lora is not None)


def needs(needed: Sequence[bool], formats: Sequence[str], *roles: str) -> bool:
    """Whether a packed tensor of one of these roles needs a gradient."""
    return any(need and role in roles for need, role in zip(needed, _all_roles(formats), strict=True))


def _all_roles(formats: Sequence[str]) -> Iterator[str]:
    return (role for form in formats for role in _roles(form))


# --- The products ---


def project(n: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, Tensor]:
    """All projections of n (M, C): y (M, ΣN) and t (M, Σr), which backward needs for dB."""
    dtype = n.dtype
    sizes = widths(projections)
    rounded = to_fp8(n) if any(map(_in_fp8, projections)) else None
    matrix = _one_matrix(projections, dtype)
    if isinstance(matrix, Rows):
        assert rounded is not None
        y = fp8_product(rounded, matrix, _one_bias(projections, dtype), dtype)
    elif matrix is not None:
        y = F.linear(n, matrix, _one_bias(projections, dtype))
    else:
        y = n.new_empty(n.shape[0], sum(sizes))
        for projection, part in zip(projections, y.split_with_sizes(sizes, 1), strict=True):
            if rounded is not None and _in_fp8(projection):
                part.copy_(fp8_product(rounded, _codes(projection), projection.bias, dtype))
                continue
            weight = dense_weight(projection.weight, dtype).t()
            if projection.bias is None:
                torch.mm(n, weight, out=part)
            else:
                torch.addmm(projection.bias.to(dtype), n, weight, out=part)
    t = n.new_empty(n.shape[0], total_rank(projections))
    if t.shape[1]:
        torch.mm(n, _stacked_a(projections, dtype).t(), out=t)
        for part, lora, t_part in _with_lora(y.split_with_sizes(sizes, 1), projections, t):
            part.addmm_(t_part, lora.b.to(dtype).t(), alpha=lora.scale)
    return y, t


def input_gradients(
    grads: Sequence[Tensor],  # dy_i (M, N_i)
    projections: Sequence[Projection],
    *,
    with_dn: bool,
    with_dt: bool,
) -> tuple[Tensor | None, Tensor]:
    """dn (M, C) if asked for, and dt (M, Σr), filled if asked for or if dn needs it."""
    dtype = grads[0].dtype
    dt = grads[0].new_empty(grads[0].shape[0], total_rank(projections))
    if with_dt or with_dn:
        for dy, lora, dt_part in _with_lora(grads, projections, dt):
            dt_part.addmm_(dy, lora.b.to(dtype), beta=0, alpha=lora.scale)
    if not with_dn:
        return None, dt
    dn: Tensor | None = None
    for dy, projection in zip(grads, projections, strict=True):
        dn = _add_input_gradient(dn, dy, projection)
    assert dn is not None
    if dt.shape[1]:
        dn.addmm_(dt, _stacked_a(projections, dtype))
    return dn, dt


def _add_input_gradient(dn: Tensor | None, dy: Tensor, projection: Projection) -> Tensor:
    """dn + dy W, in place; dy W if there is no dn yet."""
    if _in_fp8(projection):
        more = fp8_input_gradient(dy, _codes(projection))
        return more if dn is None else dn.add_(more)
    dense = dense_weight(projection.weight, dy.dtype)
    return torch.mm(dy, dense) if dn is None else dn.addmm_(dy, dense)


def parameter_gradients(
    needed: Sequence[bool],  # one per packed tensor
    grads: Sequence[Tensor],  # dy_i (M, N_i)
    tensors: Sequence[Tensor],
    formats: Sequence[str],
    scales: Sequence[float],
    n: Tensor | None,  # (M, C), if a weight or A needs a gradient
    t: Tensor,  # (M, Σr)
    dt: Tensor,
) -> list[Tensor]:
    """The gradients of the packed tensors that need one, in order."""
    found = []
    rest = iter(zip(needed, tensors, strict=True))
    column = 0
    for dy, form, scale in zip(grads, formats, scales, strict=True):
        for role in _roles(form):
            need, tensor = next(rest)
            if role == "a":
                rank = slice(column, column := column + tensor.shape[0])
            if not need:
                continue
            if role == "bias":
                found.append(dy.sum(0, dtype=tensor.dtype))
            elif role == "b":
                found.append(_mm(dy.t(), t[:, rank], tensor.dtype, scale))
            else:
                assert n is not None
                found.append(_mm((dt[:, rank] if role == "a" else dy).t(), n, tensor.dtype))
    return found


def _in_fp8(projection: Projection) -> bool:
    weight = projection.weight
    return projection.fp8 or (isinstance(weight, FrozenWeight) and weight.format.startswith("fp8"))


def _codes(projection: Projection) -> Rows:
    """Codes and scales of an fp8 weight: the stored ones, or rounded now."""
    weight = projection.weight
    return to_fp8(weight.detach()) if isinstance(weight, Tensor) else Rows(*weight.tensors)


def _one_matrix(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | Rows | None:
    fp8 = all(map(_in_fp8, projections))
    if len(projections) == 1:
        return _codes(projections[0]) if fp8 else dense_weight(projections[0].weight, dtype)
    kept = [p.weight.tensors for p in projections if isinstance(p.weight, FrozenWeight)]
    if fp8 and len(kept) == len(projections):
        one = views_of_one([codes for codes, _ in kept])
        return None if one is None else Rows(one, torch.cat([scales for _, scales in kept]))
    weights = [p.weight for p in projections if isinstance(p.weight, Tensor)]
    alike = len(weights) == len(projections) and len({p.fp8 for p in projections}) == 1
    matrix = views_of_one(weights) if alike else None
    if matrix is None:
        return None
    return to_fp8(matrix) if fp8 else matrix.to(dtype)


def _one_bias(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    found = [p.bias for p in projections if p.bias is not None]
    if not found:
        return None
    if len(projections) == 1:
        return found[0].to(dtype)
    zeros = found[0].new_zeros
    return torch.cat(
        [zeros(p.weight.shape[0], dtype=dtype) if p.bias is None else p.bias.to(dtype) for p in projections]
    )


def _stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor:
    """All A, one below the other, (Σr, C)."""
    found = [p.lora.a.to(dtype) for p in projections if p.lora is not None]
    return found[0] if len(found) == 1 else torch.cat(found)


def _with_lora(
    outputs: Sequence[Tensor],  # y_i or dy_i
    projections: Sequence[Projection],
    ranks: Tensor,  # (M, Σr)
) -> Iterator[tuple[Tensor, Lora, Tensor]]:
    """(output, adapter, its columns of `ranks`) of the projections that have an adapter."""
    column = 0
    for output, projection in zip(outputs, projections, strict=True):
        lora = projection.lora
        if lora is not None:
            rank = lora.a.shape[0]
            yield output, lora, ranks[:, column : column + rank]
            column += rank


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale · A B in `dtype`, rounded once where torch can: fp32 out of half precision, on CUDA.

    It is scaled before it is rounded, so that only a result that is too large for fp16 overflows.
    """
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16):
        found = torch.mm(a, b, out_dtype=dtype)
        return found if scale == 1.0 else found.mul_(scale)
    if scale == 1.0:
        return torch.mm(a, b).to(dtype)
    return torch.addmm(a.new_empty(len(a), b.shape[1]), a, b, beta=0, alpha=scale).to(dtype)


# --- What the public functions check ---


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's, if it is on and x is not fp64, else x's."""
    autocast = autocast_dtype(x.device)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def check_input(name: str, x: Any, shape: str) -> None:
    """Raise unless x is a floating-point tensor of at least one dimension."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATING:
        raise TypeError(f"{name}: pass a fp16, bf16, fp32 or fp64 tensor of shape {shape}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} has no features, it is not {shape}")


def check_projection(name: str, projection: Projection, features: int, x: Tensor) -> None:
    """Raise unless the projection fits an input of `features` features in x's dtype or autocast's."""
    weight, bias, lora, _ = projection
    if not isinstance(weight, FrozenWeight):
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(
                f"{name}.weight: pass a floating-point (N, {features}) tensor, or frozen_or_dense(layer) for "
                "a layer that bitsandbytes has quantised"
            )
        if weight.ndim != 2:
            raise ValueError(f"{name}.weight: shape {tuple(weight.shape)} is not (N, {features})")
    out, columns = weight.shape
    if columns != features:
        raise ValueError(f"{name}.weight: {columns} columns do not fit the input's {features} features")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"{name}.bias: shape {tuple(bias.shape)} is not ({out},)")
    if lora is not None:
        if lora.a.ndim != 2 or lora.a.shape[1] != features:
            raise ValueError(f"{name}.lora.a: shape {tuple(lora.a.shape)} is not (r, {features})")
        if tuple(lora.b.shape) != (out, lora.a.shape[0]):
            raise ValueError(
                f"{name}.lora.b: shape {tuple(lora.b.shape)} is not ({out}, {lora.a.shape[0]}), "
                "(N, r) of the weight and lora.a"
            )
    for packed in pack([projection])[0]:
        if packed.device != x.device:
            raise ValueError(f"{name}: it is on {packed.device}, the input on {x.device}; move one of them")
    dtype = product_dtype(x)
    if isinstance(weight, FrozenWeight):
        return  # bitsandbytes leaves its layers' bias in any dtype
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == dtype:
            continue
        if autocast_dtype(x.device) is None or torch.float64 in (tensor.dtype, dtype):
            raise ValueError(
                f"{name}.{part}: {tensor.dtype} does not fit {dtype} of the input; cast one of them, or use "
                "torch.autocast"
            )
