"""The paired loss's two kernels and their launchers; what they compute is in `paired_loss.py`.

Forward. Program p sums one chunk of one sample into partials[p]; then it counts itself in an int32 counter.
The program that counts last knows that all partials are there: it adds them in a fixed order and does the
epilogue of every pair in fp64 (B scalars). No float atomics: results are bitwise reproducible. How a sample
is cut into chunks depends on its size alone, so its error has the same bits whatever else is in the batch.

Order in memory. A partial is stored, the whole program passes a barrier, then one thread adds to the counter
with acquire-release semantics at GPU scope. The additions form one release sequence, so whoever reads the
final count has every partial before it; the count reaches the other threads through a second barrier. The
partials are read past the L1 cache (`.cg`), which is not coherent between multiprocessors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import block_size, completion_counter, on_device
from mapo_kernels._triton import jit, tl
from mapo_kernels.objectives import OBJECTIVES, resolve
from mapo_kernels.ops._noise import noise_target, normals
from mapo_kernels.ops._pair_layout import Halves, Layout, Operands, offsets

BLOCK = 1024
"""Elements a program handles at a time: two 16-byte loads per thread of bf16, four of fp32, with 4 warps."""
MOST_CHUNKS = 64
"""Most partial sums per sample: the epilogue adds a sample's partials as one row of a tile."""
ROWS_PER_TILE = 16
WARPS = 4
PAIRS_PER_TILE = 32 * WARPS
"""One pair per thread of the last program."""


# --- Kernels ---


@jit
def _row_sums(partials, rows, valid, chunks, MOST_CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp64 sums of the partials of some samples, always added in the same order."""
    chunk = tl.arange(0, MOST_CHUNKS)
    pointers = partials + rows[:, None] * chunks + chunk[None, :]
    inside = valid[:, None] & (chunk[None, :] < chunks)
    return tl.sum(tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), axis=1)


@jit
def _pair_terms(  # type: ignore[no-untyped-def]
    e_w,
    e_l,
    r_w,  # 0 without a reference
    r_l,
    label,  # or None
    baseline,  # or None
    a,  # the objective's settings in order
    b,
    c,
    OBJECTIVE: tl.constexpr,  # the kernel of its `Terms`
    SWAPPED: tl.constexpr,
):
    """Return loss, logit, dloss/de_w and dloss/de_l of pairs, all fp64."""
    if SWAPPED:
        loss, logit, d_l, d_w = OBJECTIVE(e_l, e_w, r_l, r_w, label, baseline, a, b, c)
    else:
        loss, logit, d_w, d_l = OBJECTIVE(e_w, e_l, r_w, r_l, label, baseline, a, b, c)
    # A saturated sigmoid's slope is 0 at an infinite margin too; 0·∞ = NaN shows it in all of the pair.
    broken = 0.0 * e_w + 0.0 * e_l + 0.0 * r_w + 0.0 * r_l
    return loss + broken, logit, d_w + broken, d_l + broken


@jit
def _load_target(  # type: ignore[no-untyped-def]
    target,  # of this sample: the stored target, the clean latents, or None
    offset,
    inside,
    first,  # logical index of the block's first element
    key,
    alpha,
    sigma,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the denoiser should have predicted for a block of elements, read or made again from its noise."""
    if KIND == "stored":
        value = tl.load(target + offset, mask=inside, other=0.0).to(ACC)
    else:
        # Past the sample's end nothing is loaded and the prediction is 0: so must the target be.
        noise = tl.where(inside, normals(key, first, BLOCK), 0.0).to(ACC)
        if KIND == "epsilon":
            value = noise
        else:
            latent = tl.load(target + offset, mask=inside, other=0.0).to(ACC)
            value = noise_target(noise, latent, alpha, sigma, KIND)
    return value


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    prediction_w,  # chosen half, (B, …)
    prediction_l,  # rejected half, (B, …)
    target_w,  # or None
    target_l,
    mask_w,  # or None
    mask_l,
    reference_w,  # the reference's prediction, or None
    reference_l,
    keys,  # (B,) int64, or None
    alphas,  # (B,) or None
    sigmas,
    given_w,  # the reference's errors if they are given, (B,) or None
    given_l,
    weights,  # (B,) or None
    labels,  # (B,) or None
    baseline,  # (1,) or None
    partials,  # (3, 2B, chunks): sums of m·d², of m·d² of the reference, and of m
    counter,  # (1,) int32, 0 on entry and on exit
    loss,  # () or (B,)
    errors,  # (2B,)
    reference_errors,  # (2B,), or None without a reference
    logits,  # (B,)
    correct,  # (B,) bool as int8
    coefficients,  # (2B,)
    pairs,
    numel,  # elements of a sample
    chunk,  # elements per program, a multiple of BLOCK
    chunks,  # programs per sample
    row_p,  # elements between samples
    row_t,
    row_m,
    row_r,
    n0,
    n1,
    n2,
    p0,
    p1,
    p2,
    p3,
    t0,
    t1,
    t2,
    t3,
    m0,
    m1,
    m2,
    m3,
    r0,
    r1,
    r2,
    r3,
    setting_a: tl.float64,
    setting_b: tl.float64,
    setting_c: tl.float64,
    KIND: tl.constexpr,  # of target
    ACC: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # indices within a sample need 64 bits
    OBJECTIVE: tl.constexpr,  # the kernel of its `Terms`: a function
    SWAPPED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    ROWS_PER_TILE: tl.constexpr,
    PAIRS_PER_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = program // chunks
    part = program % chunks
    rejected = row >= pairs
    pair = tl.where(rejected, row - pairs, row).to(tl.int64)
    prediction = tl.where(rejected, prediction_l, prediction_w) + pair * row_p
    target = None
    if target_w is not None:
        target = tl.where(rejected, target_l, target_w) + pair * row_t
    if mask_w is not None:
        mask = tl.where(rejected, mask_l, mask_w) + pair * row_m
    if reference_w is not None:
        reference = tl.where(rejected, reference_l, reference_w) + pair * row_r
    key = None
    alpha = None
    sigma = None
    if keys is not None:
        key = tl.load(keys + pair)
    if alphas is not None:
        alpha = tl.load(alphas + pair).to(ACC)
        sigma = tl.load(sigmas + pair).to(ACC)
    start = part.to(tl.int64) * chunk if WIDE else part * chunk

    total = tl.zeros([BLOCK], dtype=ACC)
    reference_total = tl.zeros([BLOCK], dtype=ACC)
    mask_total = tl.zeros([BLOCK], dtype=ACC)
    for step in range(0, chunk, BLOCK):
        first = start + step
        index = first + tl.arange(0, BLOCK)
        inside = index < numel
        p_offset = offsets(index, n0, n1, n2, p0, p1, p2, p3, DIMS)
        t_offset = offsets(index, n0, n1, n2, t0, t1, t2, t3, DIMS)
        goal = _load_target(target, t_offset, inside, first, key, alpha, sigma, KIND, ACC, BLOCK)
        difference = tl.load(prediction + p_offset, mask=inside, other=0.0).to(ACC) - goal
        square = difference * difference
        if mask_w is not None:
            m_offset = offsets(index, n0, n1, n2, m0, m1, m2, m3, DIMS)
            m = tl.load(mask + m_offset, mask=inside, other=0).to(ACC)
            square *= m
            mask_total += m
        total += square
        if reference_w is not None:
            r_offset = offsets(index, n0, n1, n2, r0, r1, r2, r3, DIMS)
            difference = tl.load(reference + r_offset, mask=inside, other=0.0).to(ACC) - goal
            square = difference * difference
            if mask_w is not None:
                square *= m
            reference_total += square
    tl.store(partials + program, tl.sum(total, axis=0))
    if reference_w is not None:
        tl.store(partials + programs + program, tl.sum(reference_total, axis=0))
    if mask_w is not None:
        tl.store(partials + 2 * programs + program, tl.sum(mask_total, axis=0))

    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        # Errors first, one tile of partials at a time; 2/N waits in `coefficients` for the slopes.
        for first_row in range(0, 2 * pairs, ROWS_PER_TILE):
            i = first_row + tl.arange(0, ROWS_PER_TILE)
            valid = i < 2 * pairs
            square_sum = _row_sums(partials, i, valid, chunks, MOST_CHUNKS)
            if mask_w is None:
                n = tl.zeros([ROWS_PER_TILE], dtype=tl.float64) + numel
            else:
                n = _row_sums(partials + 2 * programs, i, valid, chunks, MOST_CHUNKS)
            tl.store(errors + i, (square_sum / n).to(ACC), mask=valid)
            tl.store(coefficients + i, (2.0 / n).to(ACC), mask=valid)
            if reference_w is not None:
                square_sum = _row_sums(partials + programs, i, valid, chunks, MOST_CHUNKS)
                tl.store(reference_errors + i, (square_sum / n).to(ACC), mask=valid)
        tl.debug_barrier()
        # Then one pair per thread, so that the fp64 arithmetic needs few registers.
        batch_loss = tl.zeros([PAIRS_PER_TILE], dtype=tl.float64)
        for first_pair in range(0, pairs, PAIRS_PER_TILE):
            i = first_pair + tl.arange(0, PAIRS_PER_TILE)
            valid = i < pairs
            e_w = tl.load(errors + i, mask=valid, other=0.0).to(tl.float64)
            e_l = tl.load(errors + pairs + i, mask=valid, other=0.0).to(tl.float64)
            c_w = tl.load(coefficients + i, mask=valid, other=0.0).to(tl.float64)
            c_l = tl.load(coefficients + pairs + i, mask=valid, other=0.0).to(tl.float64)
            if given_w is not None:
                r_w = tl.load(given_w + i, mask=valid, other=0.0).to(ACC)
                r_l = tl.load(given_l + i, mask=valid, other=0.0).to(ACC)
                tl.store(reference_errors + i, r_w, mask=valid)
                tl.store(reference_errors + pairs + i, r_l, mask=valid)
                r_w = r_w.to(tl.float64)
                r_l = r_l.to(tl.float64)
            elif reference_w is not None:
                r_w = tl.load(reference_errors + i, mask=valid, other=0.0).to(tl.float64)
                r_l = tl.load(reference_errors + pairs + i, mask=valid, other=0.0).to(tl.float64)
            else:
                r_w = 0.0
                r_l = 0.0
            label = None
            if labels is not None:
                label = tl.load(labels + i, mask=valid, other=0.0).to(tl.float64)
            zero_point = None
            if baseline is not None:
                zero_point = tl.load(baseline).to(tl.float64)
            pair_loss, logit, d_w, d_l = _pair_terms(
                e_w, e_l, r_w, r_l, label, zero_point, setting_a, setting_b, setting_c, OBJECTIVE, SWAPPED
            )
            logit = logit.to(ACC)
            tl.store(logits + i, logit, mask=valid)
            tl.store(correct + i, (logit > 0).to(tl.int8), mask=valid)
            c_w *= d_w
            c_l *= d_l
            if weights is not None:
                weight = tl.load(weights + i, mask=valid, other=0.0).to(tl.float64)
                pair_loss *= weight
                c_w *= weight
                c_l *= weight
            if PER_PAIR:
                tl.store(loss + i, pair_loss.to(ACC), mask=valid)
            else:
                batch_loss += tl.where(valid, pair_loss, 0.0)
                c_w /= pairs
                c_l /= pairs
            tl.store(coefficients + i, c_w.to(ACC), mask=valid)
            tl.store(coefficients + pairs + i, c_l.to(ACC), mask=valid)
        if not PER_PAIR:
            tl.store(loss, (tl.sum(batch_loss, axis=0) / pairs).to(ACC))
        tl.store(counter, 0)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    prediction_w,
    prediction_l,
    target_w,  # or None
    target_l,
    mask_w,  # or None
    mask_l,
    keys,  # (B,) int64, or None
    alphas,  # (B,) or None
    sigmas,
    grad_loss,  # () or (B,)
    coefficients,  # (2B,)
    grad_w,  # chosen half of the result, (B, …)
    grad_l,
    pairs,
    numel,
    chunks,  # programs per sample, BLOCK elements each
    row_p,
    row_t,
    row_m,
    row_g,
    grad_loss_stride,  # 0 for a scalar loss
    n0,
    n1,
    n2,
    p0,
    p1,
    p2,
    p3,
    t0,
    t1,
    t2,
    t3,
    m0,
    m1,
    m2,
    m3,
    g0,
    g1,
    g2,
    g3,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    part = program % chunks
    rejected = row >= pairs
    pair = tl.where(rejected, row - pairs, row).to(tl.int64)
    prediction = tl.where(rejected, prediction_l, prediction_w) + pair * row_p
    target = None
    if target_w is not None:
        target = tl.where(rejected, target_l, target_w) + pair * row_t
    key = None
    alpha = None
    sigma = None
    if keys is not None:
        key = tl.load(keys + pair)
    if alphas is not None:
        alpha = tl.load(alphas + pair).to(ACC)
        sigma = tl.load(sigmas + pair).to(ACC)
    grad = tl.where(rejected, grad_l, grad_w) + pair * row_g
    scale = tl.load(coefficients + row) * tl.load(grad_loss + pair * grad_loss_stride)

    start = part.to(tl.int64) * BLOCK if WIDE else part * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < numel
    p_offset = offsets(index, n0, n1, n2, p0, p1, p2, p3, DIMS)
    t_offset = offsets(index, n0, n1, n2, t0, t1, t2, t3, DIMS)
    g_offset = offsets(index, n0, n1, n2, g0, g1, g2, g3, DIMS)
    goal = _load_target(target, t_offset, inside, start, key, alpha, sigma, KIND, ACC, BLOCK)
    difference = tl.load(prediction + p_offset, mask=inside, other=0.0).to(ACC) - goal
    if mask_w is not None:
        mask = tl.where(rejected, mask_l, mask_w) + pair * row_m
        m_offset = offsets(index, n0, n1, n2, m0, m1, m2, m3, DIMS)
        difference *= tl.load(mask + m_offset, mask=inside, other=0).to(ACC)
    tl.store(grad + g_offset, (scale * difference).to(grad.dtype.element_ty), mask=inside)


# --- Launchers ---


class PairScalars(NamedTuple):
    """What the epilogue takes besides the errors."""

    weights: Tensor | None  # (B,)
    labels: Tensor | None  # (B,)
    reference_errors: tuple[Tensor, Tensor] | None  # (B,) each
    baseline: Tensor | None  # one element
    objective: str
    settings: list[float]  # three, unused ones 0
    per_pair: bool


class Outputs(NamedTuple):
    """What the forward operator returns."""

    loss: Tensor  # () or (B,)
    errors: Tensor  # (2B,), chosen first
    reference_errors: Tensor  # (2B,), or (0,) without a reference
    logits: Tensor  # (B,)
    correct: Tensor  # (B,) bool
    coefficients: Tensor  # (2B,): dloss/de · 2/N


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if an operand is, else fp32."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def empty_outputs(like: Tensor, pairs: int, acc: torch.dtype, *, per_pair: bool, reference: bool) -> Outputs:
    """The outputs, not yet filled."""

    def new(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    return Outputs(
        loss=new(pairs) if per_pair else new(),
        errors=new(2 * pairs),
        reference_errors=new(2 * pairs if reference else 0),
        logits=new(pairs),
        correct=new(pairs, dtype=torch.bool),
        coefficients=new(2 * pairs),
    )


def chunking(numel: int, acc: torch.dtype = torch.float32) -> tuple[int, int, int]:
    """Return (block, elements per program, programs per sample), from the sample's size and dtype."""
    block = block_size(BLOCK if acc == torch.float32 else BLOCK // 2, numel)  # fp64 would spill
    chunk = block * -(-numel // (block * MOST_CHUNKS))
    return block, chunk, -(-numel // chunk)


def triton_dtype(dtype: torch.dtype) -> Any:
    """The kernels' name of an accumulator."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_NO_HALVES = (None, None)


def launch_forward(operands: Operands, scalars: PairScalars, layout: Layout) -> Outputs:
    """Run the forward kernel on operands that `layout` describes, in `Operands.walked`'s order."""
    prediction, target, mask, reference = operands
    like = prediction.chosen
    pairs, numel = like.shape[0], like[0].numel()
    acc = operands.accumulator
    objective = OBJECTIVES[scalars.objective]
    given = scalars.reference_errors
    has_reference = reference is not None or given is not None
    out = empty_outputs(like, pairs, acc, per_pair=scalars.per_pair, reference=has_reference)
    block, chunk, chunks = chunking(numel, acc)
    programs = 2 * pairs * chunks
    partials = torch.empty(3 * programs, dtype=acc, device=like.device)
    with on_device(like):
        _forward_kernel[(programs,)](
            *prediction,
            *(target.halves or _NO_HALVES),
            *(mask or _NO_HALVES),
            *(reference or _NO_HALVES),
            _dense(target.keys),
            _dense(target.alphas),
            _dense(target.sigmas),
            *(_NO_HALVES if given is None else map(_dense, given)),
            _dense(scalars.weights),
            _dense(scalars.labels),
            scalars.baseline,
            partials,
            completion_counter(like.device),
            out.loss,
            out.errors,
            out.reference_errors if has_reference else None,
            out.logits,
            out.correct.view(torch.int8),
            out.coefficients,
            pairs,
            numel,
            chunk,
            chunks,
            *layout.rows,
            *layout.sizes,
            *layout.strides[0],
            *layout.strides[1],
            *layout.strides[2],
            *layout.strides[3],
            *scalars.settings,
            KIND=target.kind,
            ACC=triton_dtype(acc),
            DIMS=layout.dims,
            WIDE=numel + chunk >= 2**31,
            OBJECTIVE=resolve(objective.terms).kernel,
            SWAPPED=objective.swapped,
            PER_PAIR=scalars.per_pair,
            BLOCK=block,
            MOST_CHUNKS=MOST_CHUNKS,
            ROWS_PER_TILE=ROWS_PER_TILE,
            PAIRS_PER_TILE=PAIRS_PER_TILE,
            num_warps=WARPS,
            enable_fp_fusion=True,  # its default differs between Triton versions
        )
    return out


def launch_backward(
    grad_loss: Tensor,  # () or (B,)
    coefficients: Tensor,  # (2B,)
    operands: Operands,  # without a reference
    grad: Halves,
    layout: Layout,  # of the operands, and the gradient in the reference's place
) -> None:
    """Write the gradient of both halves."""
    prediction, target, mask, _ = operands
    like = prediction.chosen
    pairs, numel = like.shape[0], like[0].numel()
    block = block_size(BLOCK, numel)
    chunks = -(-numel // block)
    with on_device(like):
        _backward_kernel[(2 * pairs * chunks,)](
            *prediction,
            *(target.halves or _NO_HALVES),
            *(mask or _NO_HALVES),
            _dense(target.keys),
            _dense(target.alphas),
            _dense(target.sigmas),
            grad_loss,
            coefficients,
            *grad,
            pairs,
            numel,
            chunks,
            *layout.rows,
            grad_loss.stride(0) if grad_loss.ndim else 0,
            *layout.sizes,
            *layout.strides[0],
            *layout.strides[1],
            *layout.strides[2],
            *layout.strides[3],
            KIND=target.kind,
            ACC=triton_dtype(coefficients.dtype),
            DIMS=layout.dims,
            WIDE=numel + block >= 2**31,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
