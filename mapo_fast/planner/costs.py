"""The cost of one PyTorch operation: floating-point operations by kind, and bytes moved.

One multiply-add counts as two operations. Every operation reads its inputs and writes its outputs once;
views and allocations move nothing. Attention is counted as the kernels compute it: scores and values in
forward, and in backward the scores again and four more products. Products in fp8 are a kind of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels.ops.adamw8bit import Tensors

aten = torch.ops.aten

ELEMENTWISE, MATRIX, FP8, CONVOLUTION, ATTENTION, FETCH, STORE, WAIT = range(8)
"""Kinds of work. The last three are of `engine/transfers.py`: copies in, copies out, waiting for one."""


class Cost(NamedTuple):
    """Cost of one operation."""

    kind: int
    flops: float
    nbytes: float


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results; `torch.utils._pytree` is ten times slower."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found = []
    for part in tree:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, dict)):
            found += tensors(part)
    return found


def size(given: Sequence[Tensor]) -> int:
    """Bytes of these tensors, each one once; a broadcast dimension counts once."""
    total = 0
    for x in {id(x): x for x in given}.values():
        elements = x.numel()
        if elements and 0 in (strides := x.stride()):
            elements = math.prod(n for n, stride in zip(x.shape, strides, strict=True) if stride)
        total += elements * x.element_size()
    return total


def _product(a: Tensor, b: Tensor) -> float:
    return 2.0 * math.prod(a.shape) * b.shape[-1]


def _convolution(weight: Tensor, out: Tensor) -> float:
    """Operations of a convolution with output (N, O, H, W) and weight (O, C, kh, kw)."""
    return 2.0 * math.prod(out.shape) * math.prod(weight.shape[1:])


def _convolution_backward(args: Sequence[Any]) -> float:
    grad, _, weight, *_, mask = args
    return (bool(mask[0]) + bool(mask[1])) * _convolution(weight, grad)


def _attention(q: Tensor, k: Tensor) -> float:
    """Operations of one product of queries (…, S, D) and keys (…, T, D)."""
    return 2.0 * math.prod(q.shape) * k.shape[-2]


_FLOPS: dict[Any, tuple[int, Callable[[Sequence[Any], Any], float]]] = {
    aten.mm: (MATRIX, lambda args, out: _product(args[0], args[1])),
    aten.addmm: (MATRIX, lambda args, out: _product(args[1], args[2])),
    aten.addmm_: (MATRIX, lambda args, out: _product(args[1], args[2])),
    aten.bmm: (MATRIX, lambda args, out: _product(args[0], args[1])),
    aten.baddbmm: (MATRIX, lambda args, out: _product(args[1], args[2])),
    aten._scaled_mm_v2: (FP8, lambda args, out: _product(args[0], args[1])),
    aten.convolution: (CONVOLUTION, lambda args, out: _convolution(args[1], out)),
    aten.convolution_backward: (CONVOLUTION, lambda args, out: _convolution_backward(args)),
    aten._scaled_dot_product_flash_attention_for_cpu: (
        ATTENTION,
        lambda args, out: 2 * _attention(args[0], args[1]),
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        ATTENTION,
        lambda args, out: 5 * _attention(args[1], args[2]),
    ),
}


def hidden_bytes(func: Any, args: Sequence[Any]) -> int:
    """Memory that CUDA's implementation needs while it runs and that the operation's results do not show.

    Flash attention's backward sums the query gradients in fp32, in rows padded to 128, and keeps a number a
    row.
    """
    if func.overloadpacket is not aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 0
    *heads, rows, width = args[1].shape
    return 4 * int(math.prod(heads)) * int(-(-rows // 128) * 128) * int(width + 1)


def addressed_bytes(tensors: Tensors, clips: bool) -> int:
    """Bytes that a step of AdamW8bit moves; its kernels find the tensors by a table of addresses.

    Parameters, moments, block maxima and step counts are read and written, gradients are read. Where updates
    are clipped, a pass before that reads all of these but the parameters and the counts.
    """
    params, gradients, *moments, steps = (size(given) for given in tensors[:7])
    update = 2 * (params + sum(moments) + steps) + gradients
    return update + gradients + sum(moments) if clips else update


def cost(
    func: Any,
    args: Any,
    given: Sequence[Tensor],
    made: Sequence[Tensor],
    out: Any,
    changed: Sequence[Tensor] = (),
) -> Cost | None:
    """Cost of a dispatched operation that has made `out` of these tensors; None if it moves nothing.

    The caller has checked that `out` is not a view.

    Args:
        changed: those of the given tensors that it writes to.
    """
    packet = func.overloadpacket
    if packet in _FREE or not (given or made):
        return None
    nbytes = float(size([*given, *made]))
    if packet not in _OVERWRITING:
        nbytes += size(changed)
    known = _FLOPS.get(packet)
    if known is None:
        return Cost(ELEMENTWISE, 0.0, nbytes)
    kind, flops = known
    return Cost(kind, flops(args, out), nbytes)


_FREE = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})

_OVERWRITING = frozenset(
    {aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten._foreach_copy_, aten._foreach_zero_}
)
"""Operations that do not read the tensors that they write to."""
