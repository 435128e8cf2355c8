"""AdamW with 8-bit moments and stochastic rounding, for all tensors of a model in a handful of launches.

    m ← β₁ m + (1 − β₁) g           v ← β₂ v + (1 − β₂) g²           g = gradient / grad_scale
    u = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)                     u ← u · min(1, max_update_rms / RMS(u))
    p ← round(p · (1 − lr · weight_decay) − lr · u)

RMS(u) is over one tensor's elements. m and v lie in memory as bitsandbytes' AdamW8bit keeps them: one byte
an element, a code of its dynamic book (`_dynamic_code.py`), times the largest magnitude of each 256
elements in memory order; fp32 in tensors below 4,096 elements.

Stochastic rounding. To bf16 and fp16, `round` picks one of the two neighbours with probabilities that make
the result right in expectation: at lr 1e-6 an update is far below half the distance of two bf16 numbers,
and rounding to nearest would drop it every time. Numbers that the type holds stay as they are, finite ones
stay finite. The 16 random bits are a function of (seed, tensor id, step, element): Philox with the seed as
key and (element // 8, id, step) as counter, word (element % 8) // 2, low half first. So they do not depend
on launches, blocks or the other tensors.

Nothing is read by the host: lr, seed, steps, grad_scale and found_inf are tensors on the device. Where
found_inf is not 0, nothing is written and no step is counted.

Launches. One to count steps and compute each tensor's scalars in fp64, and one for each combination of
dtypes (parameter, gradient, 8-bit or fp32 moments): 3 for an SDXL UNet. Clipping adds two passes: partial
sums of u² per program, then their sum per tensor in fixed order. A kernel finds its tensors by a table of
addresses, and its place in them by a table of chunks; the second is made once, the first again when a
gradient lies elsewhere.

Dtypes. Parameters and gradients bf16, fp16, fp32, fp64, in any combination; moments fp32 or 8-bit.
Arithmetic is fp32. fp64 parameters, and everything without Triton, take the same steps in plain torch, in
bitsandbytes' order of operations: on the CPU, without stochastic rounding, equal to bitsandbytes 0.50 bit
for bit, which includes its CPU library's coarser choice of codes (`cpu_code`); kernels choose the nearest,
as bitsandbytes' do.

Least traffic per element: parameter read and written, gradient read, two codes read and written, and 16
bytes per 256 elements for the block maxima: 10.06 bytes with bf16. The kernel moves that plus 2.2 kB per
16,384 elements, 1.3 % (the code books, a row of each table).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._dynamic_code import (
    both_books,
    code_book,
    cpu_code,
    nearest_code,
    signed_code,
    unsigned_code,
)
from mapo_kernels._launch import backend, block_size, jit, on_device, tl
from mapo_kernels._philox import philox_torch

QUANTISED_BLOCK = 256
"""Elements that share a largest magnitude."""
SMALLEST_QUANTISED = 4096
"""Tensors with fewer elements keep fp32 moments, as in bitsandbytes."""
BLOCK = 1024
"""Elements a program handles at a time: 8 per thread, 16 bytes of bf16; a warp holds a quantised block."""
CHUNK = 16384
"""Elements per program: its row of the tables and the code books cost little beside them."""
WARPS = 4
TENSORS_PER_PROGRAM = 128

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- Kernels ---


@jit
def _advance_kernel(  # type: ignore[no-untyped-def]
    table,  # (tensors, 10) int64, see _table_rows
    scalars,  # (tensors, 16) fp32
    lr,  # (1,)
    found_inf,  # (1,) or None
    grad_scale,  # (1,) or None
    tensors,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    TENSORS_PER_PROGRAM: tl.constexpr,
):
    """Count the step of every tensor and write what its elements need."""
    tensor = tl.program_id(0) * TENSORS_PER_PROGRAM + tl.arange(0, TENSORS_PER_PROGRAM)
    valid = tensor < tensors
    steps = tl.load(table + tensor * 10 + 6, mask=valid, other=0).to(tl.pointer_type(tl.int64))
    step = tl.load(steps, mask=valid, other=0) + 1
    counts = valid
    if found_inf is not None:
        counts = counts & (tl.load(found_inf + tensor * 0) == 0)
    tl.store(steps, step, mask=counts)

    rate = tl.load(lr).to(tl.float64)
    elapsed = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(elapsed * tl.log(beta1))
    correction2 = 1.0 - tl.exp(elapsed * tl.log(beta2))
    scale = elapsed * 0 + 1.0
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    same = elapsed * 0
    row = scalars + tensor * 16
    tl.store(row + 0, (same + (1.0 - rate * weight_decay)).to(tl.float32), mask=valid)
    tl.store(row + 1, (-rate / correction1).to(tl.float32), mask=valid)
    tl.store(row + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=valid)
    tl.store(row + 3, scale.to(tl.float32), mask=valid)
    tl.store(row + 4, (same + beta1).to(tl.float32), mask=valid)
    tl.store(row + 5, (same + (1.0 - beta1)).to(tl.float32), mask=valid)
    tl.store(row + 6, (same + beta2).to(tl.float32), mask=valid)
    tl.store(row + 7, (same + (1.0 - beta2)).to(tl.float32), mask=valid)
    tl.store(row + 8, (same + eps).to(tl.float32), mask=valid)
    tl.store(row + 9, (1.0 / correction1).to(tl.float32), mask=valid)
    tl.store(row + 10, (same + 1.0).to(tl.float32), mask=valid)  # _clip_kernel's


@jit
def _place(  # type: ignore[no-untyped-def]
    table, scalars, chunks, found_inf, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    """This program's rows of the tables, its first element, and how many it has: none in a bad step."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program * 2)
    first = tl.load(chunks + program * 2 + 1).to(tl.int64) * CHUNK
    row = table + tensor * 10
    count = tl.minimum(tl.load(row + 7) - first, CHUNK).to(tl.int32)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    return row, scalars + tensor * 16, first, count


@jit
def _pointers(row, first, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the chunk's gradients, moments and block maxima."""
    grads = tl.load(row + 1).to(tl.pointer_type(GRAD)) + first
    state1 = tl.load(row + 2).to(tl.pointer_type(STATE)) + first
    state2 = tl.load(row + 3).to(tl.pointer_type(STATE)) + first
    absmax1 = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + first // 256
    absmax2 = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + first // 256
    if ALIGNED:
        grads = tl.multiple_of(grads, 16)
        state1 = tl.multiple_of(state1, 16)
        state2 = tl.multiple_of(state2, 16)
    return grads, state1, state2, absmax1, absmax2


@jit
def _tile(local, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantised blocks and their elements, from element `local` of a chunk on, and which of them exist."""
    block = local // 256 + tl.arange(0, BLOCK // 256)
    offset = local + tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return block, block * 256 < count, offset, offset < count


@jit
def _books(books, QUANTISED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both code books, loaded once per program."""
    if QUANTISED:
        return tl.load(books + tl.arange(0, 256)), tl.load(books + 256 + tl.arange(0, 256))
    else:
        return 0.0, 0.0


@jit
def _look_up(book, codes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of (rows, 256) codes, by way of shared memory."""
    values = tl.gather(book, tl.reshape(codes.to(tl.int32), [BLOCK]), 0)
    return tl.reshape(values, [BLOCK // 256, 256])


@jit
def _moments(  # type: ignore[no-untyped-def]
    grads,
    state1,
    state2,
    absmax1,
    absmax2,
    block,
    block_inside,
    offset,
    inside,
    scale,
    beta1,
    rest1,  # 1 − β₁
    beta2,
    rest2,
    book1,  # (256,) values of the codes
    book2,
    BLOCK: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """The moments after this step, fp32; 0 outside."""
    g = tl.load(grads + offset, mask=inside, other=0.0).to(tl.float32) * scale
    if QUANTISED:
        m = _look_up(book1, tl.load(state1 + offset, mask=inside, other=127), BLOCK)  # 127 is 0
        v = _look_up(book2, tl.load(state2 + offset, mask=inside, other=0), BLOCK)
        m = m * tl.load(absmax1 + block, mask=block_inside, other=0.0)[:, None]
        v = v * tl.load(absmax2 + block, mask=block_inside, other=0.0)[:, None]
    else:
        m = tl.load(state1 + offset, mask=inside, other=0.0)
        v = tl.load(state2 + offset, mask=inside, other=0.0)
    return m * beta1 + g * rest1, v * beta2 + g * g * rest2


@jit
def _inverse(absmax):  # type: ignore[no-untyped-def]
    """1 / (0.9 absmax); 0, so that all codes are 0's, where that is Inf: a block of zeros or almost."""
    return tl.where(absmax > 1e-37, (1 / 0.9) / absmax, 0.0)


@jit
def _random_bits(key, tensor_id, step, first, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 bits for each of (ROWS, 256) elements from `first` on, int32."""
    counter = tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    counter = (first // 8 + counter).to(tl.uint32)
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    high = (step >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, counter, tensor_id.to(tl.uint32), low, high)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, 256]).to(tl.int32)


@jit
def _round_stochastically(x, random, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x, rounded to a number of DTYPE (bf16, fp16) by 16 random bits; NaN and Inf stay."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        # Both types have the same exponents: 16 bits are cut off, and a carry goes where it should.
        random = tl.where(magnitude < 0x7F7F0000, random, 0)  # nothing above the largest number but Inf
        rounded = ((bits + random) & -65536).to(tl.float32, bitcast=True)
    else:
        exponent = tl.maximum(
            magnitude & 0x7F800000, 0x38800000
        )  # subnormals lie as near as 2^-14's neighbours
        spacing = (exponent - 0x05000000).to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - (exponent - 0x05000000)).to(tl.float32, bitcast=True)
        scaled = magnitude.to(tl.float32, bitcast=True) * inverse  # < 2^11, with 13 bits behind the point
        whole = tl.floor(scaled + (random >> 3).to(tl.float32) * (1 / 8192))
        rounded = tl.minimum(whole * spacing, 65504.0)
        rounded = tl.where(bits < 0, -rounded, rounded)
    return tl.where(magnitude < 0x7F800000, rounded, x)


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    table,
    scalars,
    chunks,  # (programs, 2) int32: tensor, and which chunk of it
    books,  # (512,) fp32: the values of signed and unsigned codes
    seed,  # (1,) int64, or None to round to nearest
    found_inf,  # (1,) or None
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    QUANTISED: tl.constexpr = tl.uint8 == STATE
    row, scalar, first, count = _place(table, scalars, chunks, found_inf, ALIGNED, CHUNK)
    grads, state1, state2, absmax1, absmax2 = _pointers(row, first, GRAD, STATE, ALIGNED)
    params = tl.load(row).to(tl.pointer_type(PARAM)) + first
    if ALIGNED:
        params = tl.multiple_of(params, 16)
    decay = tl.load(scalar)
    step_size = tl.load(scalar + 1) * tl.load(scalar + 10)
    root2 = tl.load(scalar + 2)
    scale = tl.load(scalar + 3)
    beta1 = tl.load(scalar + 4)
    rest1 = tl.load(scalar + 5)
    beta2 = tl.load(scalar + 6)
    rest2 = tl.load(scalar + 7)
    eps = tl.load(scalar + 8)
    book1, book2 = _books(books, QUANTISED)
    if seed is not None:
        key = tl.load(seed)
        tensor_id = tl.load(row + 8)
        step = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.int64)))
    for local in range(0, count, BLOCK):
        block, block_inside, offset, inside = _tile(local, count, BLOCK)
        p = tl.load(params + offset, mask=inside, other=0.0).to(tl.float32)
        m, v = _moments(
            grads, state1, state2, absmax1, absmax2, block, block_inside, offset, inside,
            scale, beta1, rest1, beta2, rest2, book1, book2, BLOCK, QUANTISED,
        )  # fmt: skip
        p = p * decay + step_size * (m / (tl.sqrt(v) * root2 + eps))
        if seed is not None:
            random = _random_bits(key, tensor_id, step, first + local, BLOCK // 256)
            p = _round_stochastically(p, random, PARAM)
        tl.store(params + offset, p.to(PARAM), mask=inside)
        if QUANTISED:
            new1 = tl.max(tl.abs(m), axis=1)
            new2 = tl.max(v, axis=1)
            m = signed_code(m * _inverse(new1)[:, None]).to(tl.uint8)
            v = unsigned_code(v * _inverse(new2)[:, None]).to(tl.uint8)
            tl.store(absmax1 + block, new1, mask=block_inside)
            tl.store(absmax2 + block, new2, mask=block_inside)
        tl.store(state1 + offset, m, mask=inside)
        tl.store(state2 + offset, v, mask=inside)


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    table,
    scalars,
    chunks,
    books,
    partials,  # (programs,) fp32: sums of u²
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, scalar, first, count = _place(table, scalars, chunks, None, ALIGNED, CHUNK)
    grads, state1, state2, absmax1, absmax2 = _pointers(row, first, GRAD, STATE, ALIGNED)
    root2 = tl.load(scalar + 2)
    scale = tl.load(scalar + 3)
    beta1 = tl.load(scalar + 4)
    rest1 = tl.load(scalar + 5)
    beta2 = tl.load(scalar + 6)
    rest2 = tl.load(scalar + 7)
    eps = tl.load(scalar + 8)
    book1, book2 = _books(books, tl.uint8 == STATE)
    total = tl.zeros([BLOCK // 256, 256], dtype=tl.float32)
    for local in range(0, count, BLOCK):
        block, block_inside, offset, inside = _tile(local, count, BLOCK)
        m, v = _moments(
            grads, state1, state2, absmax1, absmax2, block, block_inside, offset, inside,
            scale, beta1, rest1, beta2, rest2, book1, book2, BLOCK, tl.uint8 == STATE,
        )  # fmt: skip
        update = m / (tl.sqrt(v) * root2 + eps)
        total += tl.where(inside, update * update, 0.0)  # 0/0 outside where ε = 0
    correction = tl.load(scalar + 9)
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0) * correction * correction)


@jit
def _clip_kernel(  # type: ignore[no-untyped-def]
    table,
    scalars,
    members,  # (programs,) int32: the tensors of the partial sums
    partials,
    max_update_rms: tl.float64,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tensor: add its partial sums in fixed order and write its factor."""
    tensor = tl.load(members + tl.program_id(0))
    row = table + tensor * 10
    numel = tl.load(row + 7)
    start = tl.load(row + 9)
    programs = (numel + CHUNK - 1) // CHUNK
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for local in range(0, programs.to(tl.int32), BLOCK):
        i = local + tl.arange(0, BLOCK)
        total += tl.load(partials + start + i, mask=i < programs, other=0.0).to(tl.float64)
    rms = tl.sqrt(tl.sum(total, axis=0) / numel)
    factor = tl.where(rms > max_update_rms, max_update_rms / rms, 1.0)
    tl.store(scalars + tensor * 16 + 10, factor.to(tl.float32))


# --- Launchers ---


class _Bucket(NamedTuple):
    """Tensors that one launch updates."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # parameter, gradient, moments
    aligned: bool
    block: int
    chunk: int
    chunks: Tensor  # (programs, 2) int32
    members: Tensor  # (tensors of this bucket,) int32


_Kinds = dict[tuple[tuple[torch.dtype, torch.dtype, torch.dtype], bool], list[int]]
"""(Dtypes of parameter, gradient, moments; whether all lie in whole 16-byte units) → tensors of that kind."""


class _Plan(NamedTuple):
    """What kernels need to find the tensors of a step."""

    where: list[int]  # the addresses in the table, and
    steps: Sequence[Tensor]  # the tensors of the last one, so that they stay valid
    kinds: _Kinds
    starts: list[int]  # a tensor's first program in its bucket
    buckets: list[_Bucket]
    table: Tensor  # (tensors, 10) int64
    scalars: Tensor  # (tensors, 16) fp32


class _Settings(NamedTuple):
    """What all tensors of a step share."""

    lr: Tensor  # one element, on the device, like the next three
    seed: Tensor | None  # int64; None rounds to nearest
    found_inf: Tensor | None
    grad_scale: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_update_rms: float | None


class _Tensors(NamedTuple):
    """The tensors of a step, lists of equal length; all of one parameter lie in memory in one order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state1: Sequence[Tensor]
    state2: Sequence[Tensor]
    absmax1: Sequence[Tensor]  # empty tensors beside fp32 moments
    absmax2: Sequence[Tensor]
    steps: Sequence[Tensor]
    ids: Sequence[int]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device, without a wait for it."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    if _capturing(device):
        raise RuntimeError(
            "AdamW8bit: the gradients moved, and a CUDA graph cannot keep the memory their addresses come "
            "from; take one step with the same .grad tensors first (zero_grad(set_to_none=False))"
        )
    return host.pin_memory().to(device, non_blocking=True)


def _plan(tensors: _Tensors, last: _Plan | None = None) -> _Plan:
    """The plan of these tensors, as far as possible with the tables of the last one."""
    where = [t.data_ptr() for values in tensors[:7] for t in values]
    device = tensors.params[0].device
    kinds: _Kinds = {}
    for i, (p, g, s1, s2) in enumerate(
        zip(tensors.params, tensors.grads, tensors.state1, tensors.state2, strict=True)
    ):
        aligned = s1.dtype == torch.uint8 and p.numel() % 16 == 0
        aligned = aligned and all(t.data_ptr() % 16 == 0 for t in (p, g, s1, s2))
        if p.numel():
            kinds.setdefault(((p.dtype, g.dtype, s1.dtype), aligned), []).append(i)
    if last is not None and last.kinds == kinds:
        starts, buckets, scalars = last.starts, last.buckets, last.scalars
    else:
        starts, buckets = [0] * len(tensors.params), []
        scalars = torch.empty(len(tensors.params), 16, device=device)
        for (dtypes, aligned), members in kinds.items():
            sizes = torch.tensor([tensors.params[i].numel() for i in members])
            block = max(QUANTISED_BLOCK, block_size(BLOCK, int(sizes.max())))
            chunk = max(CHUNK, block)
            counts = -(-sizes // chunk)
            first = counts.cumsum(0) - counts
            owner = torch.tensor(members).repeat_interleave(counts)
            number = torch.arange(len(owner)) - first.repeat_interleave(counts)
            for i, start in zip(members, first.tolist(), strict=True):
                starts[i] = start
            chunks = _upload(torch.stack([owner, number], 1), torch.int32, device)
            buckets.append(
                _Bucket(dtypes, aligned, block, chunk, chunks, _upload(members, torch.int32, device))
            )
    rest = [[p.numel() for p in tensors.params], list(tensors.ids), starts]
    addresses = torch.cat([torch.tensor(where).view(7, -1), torch.tensor(rest)]).T.contiguous()
    table = _upload(addresses, torch.int64, device)
    return _Plan(where, tensors.steps, kinds, starts, buckets, table, scalars)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _launch(plan: _Plan, settings: _Settings) -> None:
    """One step of all tensors of a plan."""
    table, scalars = plan.table, plan.scalars
    books = both_books(table.device)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    with on_device(table):
        _advance_kernel[(-(-len(table) // TENSORS_PER_PROGRAM),)](
            table,
            scalars,
            settings.lr,
            settings.found_inf,
            settings.grad_scale,
            len(table),
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.weight_decay,
            TENSORS_PER_PROGRAM=TENSORS_PER_PROGRAM,
            **options,
        )
        for bucket in plan.buckets:
            programs = len(bucket.chunks)
            param, grad, state = map(_triton_dtype, bucket.dtypes)
            shape = {"ALIGNED": bucket.aligned, "CHUNK": bucket.chunk, "BLOCK": bucket.block}
            if settings.max_update_rms is not None:
                partials = torch.empty(programs, device=table.device)
                _squares_kernel[(programs,)](
                    table, scalars, bucket.chunks, books, partials, GRAD=grad, STATE=state, **shape, **options
                )
                _clip_kernel[(len(bucket.members),)](
                    table,
                    scalars,
                    bucket.members,
                    partials,
                    settings.max_update_rms,
                    CHUNK=bucket.chunk,
                    BLOCK=BLOCK,
                    **options,
                )
            _update_kernel[(programs,)](
                table,
                scalars,
                bucket.chunks,
                books,
                settings.seed if param in (tl.bfloat16, tl.float16) else None,
                settings.found_inf,
                PARAM=param,
                GRAD=grad,
                STATE=state,
                **shape,
                **options,
            )


# --- The same without Triton ---


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


def _random_bits_torch(seed: int, tensor_id: int, step: int, numel: int) -> Tensor:
    """16 bits for each element, int32."""
    counter = torch.arange(-(-numel // 8), dtype=torch.int64)
    words = torch.stack(philox_torch(seed, counter, tensor_id, step & 0xFFFFFFFF, step >> 32), 1)
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:numel].to(torch.int32)


def _round_stochastically_torch(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 x, rounded to bf16 or fp16 by 16 random bits; NaN and Inf stay."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        random = torch.where(magnitude < 0x7F7F0000, random, 0)
        rounded = ((bits + random) & -65536).view(torch.float32)
    else:
        exponent = (magnitude & 0x7F800000).clamp(min=0x38800000)
        spacing = (exponent - 0x05000000).view(torch.float32)
        whole = (x.abs() / spacing + (random >> 3) / 8192).floor()
        rounded = torch.copysign((whole * spacing).clamp(max=65504.0), x)
    return torch.where(magnitude < 0x7F800000, rounded, x).to(dtype)


def _eager_step(tensors: _Tensors, settings: _Settings) -> None:
    """One step in plain torch. It reads the device's scalars, so it waits for the device once."""
    lr, b1, b2 = float(settings.lr), settings.beta1, settings.beta2
    if settings.found_inf is not None and bool(settings.found_inf):
        return
    for p, g, state1, state2, absmax1, absmax2, count, tensor_id in zip(*tensors, strict=True):
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
            random = _random_bits_torch(int(settings.seed), tensor_id, step, p.numel()).to(p.device)
            weight = _round_stochastically_torch(weight, random, p.dtype)
        _flat(p).copy_(weight)


# --- Operator ---


@torch.library.custom_op(
    "mapo::adamw8bit_",
    mutates_args=("params", "state1", "state2", "absmax1", "absmax2", "steps"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] steps, int[] ids, Tensor lr, Tensor? seed, "
    "Tensor? found_inf, Tensor? grad_scale, float beta1, float beta2, float eps, float weight_decay, "
    "float? max_update_rms) -> ()",
)
def _adamw8bit_op(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    steps: list[Tensor],
    ids: list[int],
    lr: Tensor,
    seed: Tensor | None,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_update_rms: float | None,
) -> None:
    _step(
        _Tensors(params, grads, state1, state2, absmax1, absmax2, steps, ids),
        _Settings(lr, seed, found_inf, grad_scale, beta1, beta2, eps, weight_decay, max_update_rms),
        _plan,
    )


@_adamw8bit_op.register_fake
def _(*_: Any) -> None:
    return None


def _step(tensors: _Tensors, settings: _Settings, plan: Callable[[_Tensors], _Plan]) -> None:
    """One step: fp64 parameters and everything without Triton in plain torch, the rest by kernels."""
    eager = [backend(p.device).name == "eager" or p.dtype == torch.float64 for p in tensors.params]
    for rest in (False, True):
        chosen = [i for i, plain in enumerate(eager) if plain == rest]
        if not chosen:
            continue
        part = tensors
        if len(chosen) < len(eager):
            part = _Tensors._make([values[i] for i in chosen] for values in tensors)
        if rest:
            _eager_step(part, settings)
        else:
            _launch(plan(part), settings)


# --- Public ---


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return a.stride() == b.stride() or all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def _check(tensors: _Tensors) -> None:
    if len({len(values) for values in tensors}) > 1:
        raise ValueError(
            f"adamw8bit_: the lists have different lengths: {[len(values) for values in tensors]}"
        )
    device = tensors.params[0].device
    for p, g, state1, state2, absmax1, absmax2, step, tensor_id in zip(*tensors, strict=True):
        name = f"parameter {tensor_id} of shape {tuple(p.shape)}"
        if p.dtype not in _FLOATING or g.dtype not in _FLOATING:
            raise TypeError(
                f"{name}: dtype {p.dtype} with a {g.dtype} gradient is not supported; use a float"
            )
        if any(t.device != device for t in (p, g, state1, state2, absmax1, absmax2, step)):
            raise ValueError(f"{name}: it, its gradient and its state must all be on {device}")
        if g.shape != p.shape or state1.shape != p.shape or state2.shape != p.shape:
            raise ValueError(
                f"{name}: gradient {tuple(g.shape)} and moments {tuple(state1.shape)}, {tuple(state2.shape)} "
                "must have its shape"
            )
        if not all(_same_order(p, t) for t in (g, state1, state2, torch.empty_like(p, device="meta"))):
            raise ValueError(
                f"{name}: strides {p.stride()}; it must be dense, and its gradient and moments must lie in "
                "memory in the same order: make them contiguous"
            )
        quantised = state1.dtype == torch.uint8
        blocks = -(-p.numel() // QUANTISED_BLOCK) if quantised else 0
        if state1.dtype != state2.dtype or state1.dtype not in (torch.uint8, torch.float32):
            raise TypeError(
                f"{name}: moments are {state1.dtype} and {state2.dtype}; both must be uint8 or fp32"
            )
        for absmax in (absmax1, absmax2):
            if absmax.numel() != blocks or absmax.dtype != torch.float32:
                raise ValueError(
                    f"{name}: absmax is {absmax.dtype} {tuple(absmax.shape)}; pass fp32 ({blocks},), one for "
                    f"every {QUANTISED_BLOCK} elements of uint8 moments"
                )
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(
                f"{name}: its step is {step.dtype} {tuple(step.shape)}; pass int64 with one element"
            )


def adamw8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    seed: Tensor | None = None,
    ids: Sequence[int] | None = None,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    max_update_rms: float | None = None,
) -> None:
    """One AdamW step in place, of all tensors at once. `AdamW8bit` makes the states and calls it.

    Args:
        params: bf16, fp16, fp32 or fp64, dense in memory in any order, on one device.
        grads: of the parameters' shapes and memory order; bf16, fp16, fp32 or fp64 (kernels: not fp64).
        state1, state2: first and second moments in the parameters' memory order: uint8 codes, or fp32.
        absmax1, absmax2: fp32 (ceil(numel / 256),) beside uint8 moments, empty tensors beside fp32 ones.
        steps: int64 tensors of one element: the steps taken so far; counted here.
        lr: a tensor of one element on the device, like `seed`, `found_inf` and `grad_scale`.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: int64; rounds bf16 and fp16 parameters stochastically. None rounds to nearest.
        ids: each tensor's number for its random bits; its place in the list if not given.
        found_inf: where it is not 0, nothing is changed.
        grad_scale: what the gradients are divided by.
        max_update_rms: largest root mean square of a tensor's update, see the top of this file.

    Raises:
        ValueError, TypeError: a tensor does not fit; the message names it.
    """
    tensors = _Tensors(params, grads, state1, state2, absmax1, absmax2, steps, ids or range(len(params)))
    if not params:
        return
    _check(tensors)
    _adamw8bit_op(
        *(list(values) for values in tensors),
        lr,
        seed,
        found_inf,
        grad_scale,
        *map(float, betas),
        float(eps),
        float(weight_decay),
        max_update_rms,
    )


def adamw8bit_reference(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float = 1.0,
    max_update_rms: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of a tensor's step `step` (from 1), in fp64 and without any rounding; for tests.

    Returns:
        The new parameter and moments, fp64.
    """
    g = grad.double() / grad_scale
    m = betas[0] * m.double() + (1 - betas[0]) * g
    v = betas[1] * v.double() + (1 - betas[1]) * g**2
    update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    rms = update.square().mean().sqrt()
    if max_update_rms is not None and rms > max_update_rms:
        update = update * (max_update_rms / rms)
    return param.double() * (1 - lr * weight_decay) - lr * update, m, v


_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' `state_dict` keeps the tensors that FSDP must not see."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments: bitsandbytes' AdamW8bit with stochastic rounding and without host waits.

    States have bitsandbytes' names and layout: `step` (here a tensor), `state1`, `state2`, `qmap1`, `qmap2`,
    `absmax1`, `absmax2`; the last four only in tensors of at least 4,096 elements. `load_state_dict` takes
    bitsandbytes' and its own. They belong to a parameter's elements by their order in memory: a parameter
    whose memory order changed after the first step is laid out again as it was.

    `found_inf` and `grad_scale`, if set as attributes before `step()`, are tensors on the device as for
    torch's fused AdamW, so `torch.amp.GradScaler` skips bad steps without a host wait.

    CUDA graphs: capture `step()` after one step with the same `.grad` tensors; pass `lr` as a tensor and
    change it in place.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        stochastic_rounding: of bf16 and fp16 parameters; others are rounded to nearest anyway.
        seed: of the random bits, which also depend on the step, the parameter's place and the element.
        max_update_rms: largest root mean square of a tensor's update before lr, as in Adafactor; None: any.
    """

    _step_supports_amp_scaling = True
    """What `torch.amp.GradScaler` asks for before it sets the next two."""
    found_inf: Tensor
    grad_scale: Tensor

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
        max_update_rms: float | None = None,
    ) -> None:
        for name, value, good in (
            ("lr", lr, isinstance(lr, Tensor) or lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_update_rms", max_update_rms, max_update_rms is None or max_update_rms > 0),
            ("seed", seed, -(2**63) <= seed < 2**63),
        ):
            if not good:
                raise ValueError(f"{name}: {value} is out of range")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "max_update_rms": max_update_rms,
        }
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Start without tables: they hold addresses."""
        self._plans: dict[int, _Plan] = {}
        self._captured: list[_Plan] = []
        self._scalars: dict[tuple[int, str], tuple[float, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which has parameters, settings and states and nothing else."""
        super().__setstate__(state)
        self._forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient keep their value and their step count."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for index, group in enumerate(self.param_groups):
            members = [(i, p) for i, p in enumerate(group["params"], first) if p.grad is not None]
            first += len(group["params"])
            if members:
                self._step_group(index, group, members)
        return loss

    def _step_group(self, index: int, group: dict[str, Any], members: list[tuple[int, Tensor]]) -> None:
        states = [self._state(p, i) for i, p in members]
        params = [p for _, p in members]
        device = params[0].device
        nothing = torch.empty(0, device=device)
        tensors = _Tensors(
            params=params,
            grads=[_in_order(p.grad, p) for p in params if p.grad is not None],
            state1=[state["state1"] for state in states],
            state2=[state["state2"] for state in states],
            absmax1=[state.get("absmax1", nothing) for state in states],
            absmax2=[state.get("absmax2", nothing) for state in states],
            steps=[state["step"] for state in states],
            ids=[i for i, _ in members],
        )
        settings = _Settings(
            self._scalar(index, group, "lr", torch.float64, device),
            self._scalar(index, group, "seed", torch.int64, device) if group["stochastic_rounding"] else None,
            getattr(self, "found_inf", None),
            getattr(self, "grad_scale", None),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_update_rms=group["max_update_rms"],
        )

        def plan(part: _Tensors) -> _Plan:
            """The last one, unless a tensor lies elsewhere or is another."""
            last = self._plans.get(index)
            where = [t.data_ptr() for values in part[:3] for t in values]
            if (
                last is None
                or last.where[: len(where)] != where
                or any(a is not b for a, b in zip(last.steps, part.steps, strict=True))
            ):
                _check(part)
                self._plans[index] = last = _plan(part, last)
            if _capturing(device):
                self._captured.append(last)  # a graph needs its tables as long as it lives
            return last

        _step(tensors, settings, plan)

    def _scalar(
        self, index: int, group: dict[str, Any], key: str, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A group's setting on the device; written anew, without a host wait, when it changed."""
        value = group[key]
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        known = self._scalars.get((index, key))
        if known is None or known[0] != value or known[1].device != device:
            tensor = known[1] if known is not None and known[1].device == device else None
            tensor = torch.empty((), dtype=dtype, device=device) if tensor is None else tensor
            known = self._scalars[index, key] = value, tensor.fill_(value)
        return known[1]

    def _state(self, p: Tensor, tensor_id: int) -> dict[str, Any]:
        """A parameter's state: made, or brought into shape where it was loaded."""
        state: dict[str, Any] = self.state[p]
        name = f"parameter {tensor_id} of shape {tuple(p.shape)}"
        if not state:
            quantised = p.numel() >= SMALLEST_QUANTISED
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
            for key, signed in (("1", True), ("2", False)):
                state[f"state{key}"] = torch.zeros_like(p, dtype=torch.uint8 if quantised else torch.float32)
                if quantised:
                    state[f"qmap{key}"] = code_book(signed, p.device)
                    blocks = -(-p.numel() // QUANTISED_BLOCK)
                    state[f"absmax{key}"] = torch.zeros(blocks, device=p.device)
        elif not isinstance(state["step"], Tensor):
            for key, signed in (("1", True), ("2", False)):
                book = state.get(f"qmap{key}")
                if book is not None and not torch.equal(book.to(p.device), code_book(signed, p.device)):
                    raise ValueError(f"{name}: qmap{key} is not the dynamic 8-bit map; make a new optimizer")
                moment = state[f"state{key}"]
                if not moment.is_contiguous():
                    raise ValueError(
                        f"{name}: bitsandbytes' state{key} has strides {moment.stride()}, which do not say "
                        "the order of its blocks; make a new optimizer"
                    )
            state["step"] = torch.tensor(state["step"], dtype=torch.int64, device=p.device)
        if state["state1"].shape != p.shape:
            raise ValueError(f"{name}: its state has shape {tuple(state['state1'].shape)}, it is another's")
        if not _same_order(p, state["state1"]):
            if not _same_order(p, torch.empty_like(p, device="meta")):
                raise ValueError(f"{name}: strides {p.stride()} leave gaps in memory; make it contiguous")
            p.data = _in_order(p, state["state1"])
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict` of this class or of `bitsandbytes.optim.AdamW8bit`; nothing is cast.

        Raises:
            ValueError: the parameter groups do not match.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("state_dict: its parameter groups are not of this optimizer's sizes")
        keys = chain.from_iterable(g["params"] for g in saved_groups)
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        self.state.clear()
        for key, p in zip(keys, params, strict=True):
            saved = dict(state_dict["state"].get(key, {}))
            saved.update(saved.pop(_WRAPPED, {}))
            if saved:
                self.state[p] = {
                    name: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in saved.items()
                }
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def _in_order(x: Tensor, like: Tensor) -> Tensor:
    """x, copied if need be, with its elements in memory in the order of a dense `like`."""
    if x.stride() == like.stride() or _same_order(x, like):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
