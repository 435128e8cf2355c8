"""AdamW8bit's kernels, and the tables and launches of a step; what they compute is in `adamw8bit.py`.

Launches. One to count steps and compute each tensor's scalars in fp64, and one for each combination of
dtypes (parameter, gradient, 8-bit or fp32 moments): 3 for an SDXL UNet. Clipping adds two passes: partial
sums of u² per program, then their sum per tensor in fixed order. A kernel finds its tensors by a table of
addresses, and its place in them by a table of chunks; the second is made once, the first again when a
gradient lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, on_device
from mapo_kernels._rounding import random_bits, round_stochastically
from mapo_kernels._triton import jit, tl
from mapo_kernels.ops._adamw8bit_tensors import QUANTISED_BLOCK, Settings, Tensors
from mapo_kernels.ops._dynamic_code import both_books, signed_code, unsigned_code

BLOCK = 1024
"""Elements a program handles at a time: 8 per thread, 16 bytes of bf16; a warp holds a quantised block."""
CHUNK = 16384
"""Elements per program: reading its row of the tables and the code books adds little to them."""
WARPS = 4
TENSORS_PER_PROGRAM = 128


# --- Kernels ---


@jit
def _advance_kernel(  # type: ignore[no-untyped-def]
    table,  # (tensors, 10) int64, see make_plan
    scalars,  # (tensors, 16) fp32
    lr,  # (1,)
    found_inf,  # (1,), (tensors,) or None
    grad_scale,  # (1,) or None
    tensors,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    FLAG_STRIDE: tl.constexpr,  # 1 where found_inf has a value for each tensor, else 0
    TENSORS_PER_PROGRAM: tl.constexpr,
):
    """Count the step of every tensor and write what its elements need."""
    tensor = tl.program_id(0) * TENSORS_PER_PROGRAM + tl.arange(0, TENSORS_PER_PROGRAM)
    valid = tensor < tensors
    steps = tl.load(table + tensor * 10 + 6, mask=valid, other=0).to(tl.pointer_type(tl.int64))
    step = tl.load(steps, mask=valid, other=0) + 1
    counts = valid
    if found_inf is not None:
        counts = counts & (tl.load(found_inf + tensor * FLAG_STRIDE, mask=valid, other=0) == 0)
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
    table, scalars, chunks, found_inf, FLAG_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    """This program's rows of the tables, its first element, and how many it has: none of a skipped tensor."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program * 2)
    first = tl.load(chunks + program * 2 + 1).to(tl.int64) * CHUNK
    row = table + tensor * 10
    count = tl.minimum(tl.load(row + 7) - first, CHUNK).to(tl.int32)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf + tensor * FLAG_STRIDE) == 0, count, 0)
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
def _update_kernel(  # type: ignore[no-untyped-def]
    table,
    scalars,
    chunks,  # (programs, 2) int32: tensor, and which chunk of it
    books,  # (512,) fp32: the values of signed and unsigned codes
    seed,  # (1,) int64, or None to round to nearest
    found_inf,  # (1,), (tensors,) or None
    FLAG_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    QUANTISED: tl.constexpr = tl.uint8 == STATE
    row, scalar, first, count = _place(table, scalars, chunks, found_inf, FLAG_STRIDE, ALIGNED, CHUNK)
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
            random = random_bits(key, tensor_id, step, first + local, BLOCK // 256)
            p = round_stochastically(p, random, PARAM)
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
    row, scalar, first, count = _place(table, scalars, chunks, None, 0, ALIGNED, CHUNK)
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


# --- Tables and launches ---


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


class Plan(NamedTuple):
    """What kernels need to find the tensors of a step."""

    where: list[int]  # the addresses in the table, and
    steps: Sequence[Tensor]  # the tensors of the last one, so that they stay valid
    kinds: _Kinds
    starts: list[int]  # a tensor's first program in its bucket
    buckets: list[_Bucket]
    table: Tensor  # (tensors, 10) int64
    scalars: Tensor  # (tensors, 16) fp32
    hosts: list[Tensor]  # what a CUDA graph copies the tables from each time it is replayed


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values: Any, dtype: torch.dtype, device: torch.device, hosts: list[Tensor]) -> Tensor:
    """A table on the device, without a wait for it. In a capture `hosts` gets what it is copied from."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    host = host.pin_memory()
    if capturing(device):
        hosts.append(host)
    return host.to(device, non_blocking=True)


def make_plan(tensors: Tensors, last: Plan | None = None) -> Plan:
    """The plan of these tensors, as far as possible with the tables of the last one."""
    where = [t.data_ptr() for values in tensors[:7] for t in values]
    device = tensors.params[0].device
    hosts: list[Tensor] = []
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
        hosts += last.hosts  # of its buckets
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
            chunks = _upload(torch.stack([owner, number], 1), torch.int32, device, hosts)
            uploaded = _upload(members, torch.int32, device, hosts)
            buckets.append(_Bucket(dtypes, aligned, block, chunk, chunks, uploaded))
    rest = [[p.numel() for p in tensors.params], list(tensors.ids), starts]
    addresses = torch.cat([torch.tensor(where).view(7, -1), torch.tensor(rest)]).T.contiguous()
    table = _upload(addresses, torch.int64, device, hosts)
    return Plan(where, tensors.steps, kinds, starts, buckets, table, scalars, hosts)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def launch(plan: Plan, settings: Settings) -> None:
    """One step of all tensors of a plan."""
    table, scalars = plan.table, plan.scalars
    books = both_books(table.device)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    flags = settings.found_inf
    stride = int(flags is not None and flags.numel() > 1)
    with on_device(table):
        _advance_kernel[(-(-len(table) // TENSORS_PER_PROGRAM),)](
            table,
            scalars,
            settings.lr,
            flags,
            settings.grad_scale,
            len(table),
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.weight_decay,
            FLAG_STRIDE=stride,
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
                flags,
                FLAG_STRIDE=stride,
                PARAM=param,
                GRAD=grad,
                STATE=state,
                **shape,
                **options,
            )
