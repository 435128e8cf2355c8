"""Paired preference loss: squared errors, log-odds margin, mean loss and gradient in one launch each way.

    e_i     = mean over a sample of (prediction_i − target_i)²        or Σ m·d² / Σ m with a mask m
    loss    = 1/B · Σ_pairs weight · f(e_w, e_l)                      f: see objectives.py
    grad_i  = grad_out · c_i · m · (prediction_i − target_i)          c_i = ∂loss/∂e_i · 2/N_i
                                                                      N_i = C·H·W or Σ m

Shapes. Predictions and targets are (2B, …), the B chosen samples first, or a pair of (B, …) halves, which
are read where they lie: kernels get one pointer per half, nothing is concatenated or sliced in autograd.

Forward. Program p sums one chunk of one sample into partials[p]; then it counts itself in an int32 counter.
The program that counts last knows that all partials are there: it adds them in a fixed order and does the
epilogue of every pair in fp64 (B scalars). No float atomics: results are bitwise reproducible. How a sample
is cut into chunks depends on its size alone, so its error has the same bits whatever else is in the batch.

Order in memory. A partial is stored, the whole program passes a barrier, then one thread adds to the counter
with acquire-release semantics at GPU scope. The additions form one release sequence, so whoever reads the
final count has every partial before it; the count reaches the other threads through a second barrier. The
partials are read past the L1 cache (`.cg`), which is not coherent between multiprocessors.

Dtypes. Inputs are converted to fp32 on load (all to fp64 if one is fp64) and accumulated in that dtype;
errors, logits and loss are returned in it. The epilogue starts from the errors as returned, so `from_errors`
on them gives the same logits. Gradients are rounded once, to the prediction's dtype.

Saved for backward: the inputs and the (2B,) coefficients. Least traffic: forward reads prediction and target
once; backward reads both again and writes the gradient. Both kernels move that, plus ≤ 1 kB per sample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels._launch import backend, block_size, completion_counter, jit, on_device, tl
from mapo_kernels._pair_checks import FLOATING, TensorOrPair, check_inputs, check_scalars, check_weights
from mapo_kernels._pair_layout import Halves, Layout, mask_halves, merge_layout, split_halves
from mapo_kernels.objectives import pair_terms, pair_terms_torch

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
def _offsets(index, n0, n1, n2, s0, s1, s2, s3, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Element offsets of flat indices in a sample of DIMS dimensions, innermost first."""
    if DIMS == 1:
        offset = index.to(tl.int64) * s0
    elif DIMS == 2:
        offset = (index % n0).to(tl.int64) * s0 + (index // n0).to(tl.int64) * s1
    else:
        rest = index // n0
        offset = (index % n0).to(tl.int64) * s0 + (rest % n1).to(tl.int64) * s1
        rest = rest // n1
        if DIMS == 3:
            offset += rest.to(tl.int64) * s2
        else:
            offset += (rest % n2).to(tl.int64) * s2 + (rest // n2).to(tl.int64) * s3
    return offset


@jit
def _row_sums(partials, rows, valid, chunks, MOST_CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp64 sums of the partials of some samples, always added in the same order."""
    chunk = tl.arange(0, MOST_CHUNKS)
    pointers = partials + rows[:, None] * chunks + chunk[None, :]
    inside = valid[:, None] & (chunk[None, :] < chunks)
    return tl.sum(tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), axis=1)


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    prediction_w,  # chosen half, (B, …)
    prediction_l,  # rejected half, (B, …)
    target_w,
    target_l,
    mask_w,  # or None
    mask_l,
    weights,  # (B,) or None
    partials,  # (1 or 2, 2B, chunks): sums of m·d², and of m with a mask
    counter,  # (1,) int32, 0 on entry and on exit
    loss,  # () or (B,)
    errors,  # (2B,)
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
    beta: tl.float64,
    snr: tl.float64,
    timesteps: tl.float64,
    ACC: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # indices within a sample need 64 bits
    OBJECTIVE: tl.constexpr,
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
    target = tl.where(rejected, target_l, target_w) + pair * row_t
    if mask_w is not None:
        mask = tl.where(rejected, mask_l, mask_w) + pair * row_m
    start = part.to(tl.int64) * chunk if WIDE else part * chunk

    total = tl.zeros([BLOCK], dtype=ACC)
    mask_total = tl.zeros([BLOCK], dtype=ACC)
    for step in range(0, chunk, BLOCK):
        index = start + step + tl.arange(0, BLOCK)
        inside = index < numel
        p_offset = _offsets(index, n0, n1, n2, p0, p1, p2, p3, DIMS)
        t_offset = _offsets(index, n0, n1, n2, t0, t1, t2, t3, DIMS)
        difference = tl.load(prediction + p_offset, mask=inside, other=0.0).to(ACC)
        difference -= tl.load(target + t_offset, mask=inside, other=0.0).to(ACC)
        if mask_w is None:
            total += difference * difference
        else:
            m_offset = _offsets(index, n0, n1, n2, m0, m1, m2, m3, DIMS)
            m = tl.load(mask + m_offset, mask=inside, other=0).to(ACC)
            total += m * (difference * difference)
            mask_total += m
    tl.store(partials + program, tl.sum(total, axis=0))
    if mask_w is not None:
        tl.store(partials + programs + program, tl.sum(mask_total, axis=0))

    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        # Errors first, one tile of partials at a time; 2/N waits in `coefficients` for the slopes.
        for first in range(0, 2 * pairs, ROWS_PER_TILE):
            i = first + tl.arange(0, ROWS_PER_TILE)
            valid = i < 2 * pairs
            square_sum = _row_sums(partials, i, valid, chunks, MOST_CHUNKS)
            if mask_w is None:
                n = tl.zeros([ROWS_PER_TILE], dtype=tl.float64) + numel
            else:
                n = _row_sums(partials + programs, i, valid, chunks, MOST_CHUNKS)
            tl.store(errors + i, (square_sum / n).to(ACC), mask=valid)
            tl.store(coefficients + i, (2.0 / n).to(ACC), mask=valid)
        tl.debug_barrier()
        # Then one pair per thread, so that the fp64 arithmetic needs few registers.
        batch_loss = tl.zeros([PAIRS_PER_TILE], dtype=tl.float64)
        for first in range(0, pairs, PAIRS_PER_TILE):
            i = first + tl.arange(0, PAIRS_PER_TILE)
            valid = i < pairs
            e_w = tl.load(errors + i, mask=valid, other=0.0).to(tl.float64)
            e_l = tl.load(errors + pairs + i, mask=valid, other=0.0).to(tl.float64)
            c_w = tl.load(coefficients + i, mask=valid, other=0.0).to(tl.float64)
            c_l = tl.load(coefficients + pairs + i, mask=valid, other=0.0).to(tl.float64)
            pair_loss, logit, d_w, d_l = pair_terms(e_w, e_l, beta, snr, timesteps, OBJECTIVE)
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
    target_w,
    target_l,
    mask_w,  # or None
    mask_l,
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
    target = tl.where(rejected, target_l, target_w) + pair * row_t
    grad = tl.where(rejected, grad_l, grad_w) + pair * row_g
    scale = tl.load(coefficients + row) * tl.load(grad_loss + pair * grad_loss_stride)

    start = part.to(tl.int64) * BLOCK if WIDE else part * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < numel
    p_offset = _offsets(index, n0, n1, n2, p0, p1, p2, p3, DIMS)
    t_offset = _offsets(index, n0, n1, n2, t0, t1, t2, t3, DIMS)
    g_offset = _offsets(index, n0, n1, n2, g0, g1, g2, g3, DIMS)
    difference = tl.load(prediction + p_offset, mask=inside, other=0.0).to(ACC)
    difference -= tl.load(target + t_offset, mask=inside, other=0.0).to(ACC)
    if mask_w is not None:
        mask = tl.where(rejected, mask_l, mask_w) + pair * row_m
        m_offset = _offsets(index, n0, n1, n2, m0, m1, m2, m3, DIMS)
        difference *= tl.load(mask + m_offset, mask=inside, other=0).to(ACC)
    tl.store(grad + g_offset, (scale * difference).to(grad.dtype.element_ty), mask=inside)


# --- Launchers ---


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunking(numel: int) -> tuple[int, int, int]:
    """Return (block, elements per program, programs per sample); a function of the sample's size alone."""
    block = block_size(BLOCK, numel)
    chunk = block * -(-numel // (block * MOST_CHUNKS))
    return block, chunk, -(-numel // chunk)


def _triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


class _Terms(NamedTuple):
    """What the forward operator returns."""

    loss: Tensor  # () or (B,)
    errors: Tensor  # (2B,), chosen first
    logits: Tensor  # (B,)
    correct: Tensor  # (B,) bool
    coefficients: Tensor  # (2B,): dloss/de · 2/N


def _empty_terms(like: Tensor, pairs: int, acc: torch.dtype, per_pair: bool) -> _Terms:
    def new(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    return _Terms(
        loss=new(pairs) if per_pair else new(),
        errors=new(2 * pairs),
        logits=new(pairs),
        correct=new(pairs, dtype=torch.bool),
        coefficients=new(2 * pairs),
    )


def _launch_forward(
    prediction: Halves,
    target: Halves,
    mask: Halves | None,
    weights: Tensor | None,
    layout: Layout,
    objective: str,
    scalars: tuple[float, float, float],
    per_pair: bool,
) -> _Terms:
    like = prediction.chosen
    pairs, numel = like.shape[0], like[0].numel()
    acc = _accumulator(like, target.chosen)
    out = _empty_terms(like, pairs, acc, per_pair)
    block, chunk, chunks = _chunking(numel)
    programs = 2 * pairs * chunks
    partials = torch.empty((1 if mask is None else 2) * programs, dtype=acc, device=like.device)
    with on_device(like):
        _forward_kernel[(programs,)](
            *prediction,
            *target,
            *(mask or (None, None)),
            weights if weights is None else weights.contiguous(),
            partials,
            completion_counter(like.device),
            out.loss,
            out.errors,
            out.logits,
            out.correct.view(torch.int8),
            out.coefficients,
            pairs,
            numel,
            chunk,
            chunks,
            prediction.row,
            target.row,
            0 if mask is None else mask.row,
            *layout.sizes,
            *layout.strides[0],
            *layout.strides[1],
            *layout.strides[2],
            *scalars,
            ACC=_triton_dtype(acc),
            DIMS=layout.dims,
            WIDE=numel + chunk >= 2**31,
            OBJECTIVE=objective,
            PER_PAIR=per_pair,
            BLOCK=block,
            MOST_CHUNKS=MOST_CHUNKS,
            ROWS_PER_TILE=ROWS_PER_TILE,
            PAIRS_PER_TILE=PAIRS_PER_TILE,
            num_warps=WARPS,
            enable_fp_fusion=True,  # its default differs between Triton versions
        )
    return out


def _launch_backward(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: Halves,
    target: Halves,
    mask: Halves | None,
    grad: Halves,
    layout: Layout,
) -> None:
    like = prediction.chosen
    pairs, numel = like.shape[0], like[0].numel()
    block = block_size(BLOCK, numel)
    chunks = -(-numel // block)
    with on_device(like):
        _backward_kernel[(2 * pairs * chunks,)](
            *prediction,
            *target,
            *(mask or (None, None)),
            grad_loss,
            coefficients,
            *grad,
            pairs,
            numel,
            chunks,
            prediction.row,
            target.row,
            0 if mask is None else mask.row,
            grad.row,
            grad_loss.stride(0) if grad_loss.ndim else 0,
            *layout.sizes,
            *layout.strides[0],
            *layout.strides[1],
            *layout.strides[2],
            *layout.strides[3],
            ACC=_triton_dtype(coefficients.dtype),
            DIMS=layout.dims,
            WIDE=numel + block >= 2**31,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


# --- The same without Triton ---


def _pair_outputs(
    errors: Tensor,  # (2B,)
    weights: Tensor | None,
    objective: str,
    scalars: tuple[float, float, float],
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, logits, correct and the fp64 dloss/de_w, dloss/de_l from the errors."""
    e_w, e_l = errors.chunk(2)
    pair_loss, logits, d_w, d_l = pair_terms_torch(e_w, e_l, objective, *scalars)
    if weights is not None:
        weight = weights.double()
        pair_loss, d_w, d_l = pair_loss * weight, d_w * weight, d_l * weight
    if not per_pair:
        pair_loss, d_w, d_l = pair_loss.mean(), d_w / len(e_w), d_l / len(e_w)
    logits = logits.to(errors.dtype)
    return pair_loss.to(errors.dtype), logits, logits > 0, d_w, d_l


def _eager_forward(
    prediction: Halves,
    target: Halves,
    mask: Halves | None,
    weights: Tensor | None,
    objective: str,
    scalars: tuple[float, float, float],
    per_pair: bool,
) -> _Terms:
    acc = _accumulator(prediction.chosen, target.chosen)
    sample_dims = list(range(1, prediction.chosen.ndim))
    numel = prediction.chosen[0].numel()
    sums, counts = [], []
    for p, t, m in zip(prediction, target, mask or (None, None), strict=True):
        square = (p.to(acc) - t.to(acc)).square_()
        if m is None:
            counts.append(torch.full((len(p),), numel, dtype=torch.float64, device=p.device))
        else:
            square *= m.to(acc)
            counts.append(m.to(acc).sum(sample_dims).double())
        sums.append(square.sum(sample_dims).double())
    count = torch.cat(counts)
    errors = (torch.cat(sums) / count).to(acc)
    loss, logits, correct, d_w, d_l = _pair_outputs(errors, weights, objective, scalars, per_pair)
    return _Terms(loss, errors, logits, correct, (2.0 * torch.cat([d_w, d_l]) / count).to(acc))


def _eager_backward(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: Halves,
    target: Halves,
    mask: Halves | None,
    grad: Halves,
) -> None:
    acc = coefficients.dtype
    for p, t, m, g, c in zip(
        prediction, target, mask or (None, None), grad, coefficients.chunk(2), strict=True
    ):
        difference = p.to(acc) - t.to(acc)
        if m is not None:
            difference *= m.to(acc)
        g.copy_(difference * (c * grad_loss).view(-1, *[1] * (p.ndim - 1)))


# --- Operators ---


@torch.library.custom_op(
    "mapo::paired_loss",
    mutates_args=(),
    schema="(Tensor prediction, Tensor? prediction_rejected, Tensor target, Tensor? target_rejected, "
    "Tensor? weights, Tensor? mask, str objective, float beta, float snr, float timesteps, bool per_pair)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),  # see completion_counter
)
def _paired_loss_op(
    prediction: Tensor,
    prediction_rejected: Tensor | None,
    target: Tensor,
    target_rejected: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    objective: str,
    beta: float,
    snr: float,
    timesteps: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    predictions = split_halves(prediction, prediction_rejected)
    targets = split_halves(target, target_rejected)
    masks = mask_halves(mask, predictions.chosen)
    scalars = (beta, snr, timesteps)
    layout = None
    if backend(prediction.device).name != "eager":
        layout = merge_layout(predictions, targets, masks)
    if layout is None:
        return _eager_forward(predictions, targets, masks, weights, objective, scalars, per_pair)
    return _launch_forward(predictions, targets, masks, weights, layout, objective, scalars, per_pair)


@_paired_loss_op.register_fake
def _(
    prediction: Tensor,
    prediction_rejected: Tensor | None,
    target: Tensor,
    target_rejected: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    objective: str,
    beta: float,
    snr: float,
    timesteps: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = prediction.shape[0] if prediction_rejected is not None else prediction.shape[0] // 2
    return _empty_terms(prediction, pairs, _accumulator(prediction, target), per_pair)


@torch.library.custom_op(
    "mapo::paired_loss_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor coefficients, Tensor prediction, Tensor? prediction_rejected, "
    "Tensor target, Tensor? target_rejected, Tensor? mask) -> Tensor[]",
)
def _paired_loss_backward_op(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: Tensor,
    prediction_rejected: Tensor | None,
    target: Tensor,
    target_rejected: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    predictions = split_halves(prediction, prediction_rejected)
    targets = split_halves(target, target_rejected)
    masks = mask_halves(mask, predictions.chosen)
    results = [torch.empty_like(p) for p in (prediction, prediction_rejected) if p is not None]
    grads = split_halves(results[0], results[1] if len(results) > 1 else None)
    layout = None
    if backend(prediction.device).name != "eager":
        layout = merge_layout(predictions, targets, masks, grads)
    if layout is None:
        _eager_backward(grad_loss, coefficients, predictions, targets, masks, grads)
    else:
        _launch_backward(grad_loss, coefficients, predictions, targets, masks, grads, layout)
    return results


@_paired_loss_backward_op.register_fake
def _(
    grad_loss: Tensor,
    coefficients: Tensor,
    prediction: Tensor,
    prediction_rejected: Tensor | None,
    target: Tensor,
    target_rejected: Tensor | None,
    mask: Tensor | None,
) -> list[Tensor]:
    return [torch.empty_like(p) for p in (prediction, prediction_rejected) if p is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, prediction_rejected, target, target_rejected, _, mask, *_ = inputs
    ctx.save_for_backward(output[4], prediction, prediction_rejected, target, target_rejected, mask)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grads = _paired_loss_backward_op(grad_loss, *ctx.saved_tensors)
    return (grads[0], grads[1] if len(grads) > 1 else None, *[None] * 9)


_paired_loss_op.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(
    "mapo::paired_loss_from_errors",
    mutates_args=(),
    schema="(Tensor chosen_error, Tensor rejected_error, Tensor? weights, str objective, float beta, "
    "float snr, float timesteps, bool per_pair) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _from_errors_op(
    chosen_error: Tensor,
    rejected_error: Tensor,
    weights: Tensor | None,
    objective: str,
    beta: float,
    snr: float,
    timesteps: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = _accumulator(chosen_error, rejected_error)
    errors = torch.cat([chosen_error.to(acc), rejected_error.to(acc)])
    loss, logits, correct, d_w, d_l = _pair_outputs(
        errors, weights, objective, (beta, snr, timesteps), per_pair
    )
    return loss, logits, correct, torch.cat([d_w, d_l]).to(acc)


@_from_errors_op.register_fake
def _(
    chosen_error: Tensor,
    rejected_error: Tensor,
    weights: Tensor | None,
    objective: str,
    beta: float,
    snr: float,
    timesteps: float,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = _accumulator(chosen_error, rejected_error)
    out = _empty_terms(chosen_error, chosen_error.shape[0], acc, per_pair)
    return out.loss, out.logits, out.correct, out.coefficients


def _save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)


def _from_errors_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    chosen, rejected = ctx.saved_tensors[0].chunk(2)
    return (
        (grad_loss * chosen).to(ctx.dtypes[0]),
        (grad_loss * rejected).to(ctx.dtypes[1]),
        *[None] * 6,
    )


_from_errors_op.register_autograd(_from_errors_backward, setup_context=_save_slopes)


# --- Public functions ---


class PairedLoss(NamedTuple):
    """Loss and diagnostics of a batch of B pairs, on the inputs' device; fp64 if an input is, else fp32."""

    loss: Tensor
    """() for `reduction="mean"`, (B,) for `"none"`; the only output that carries a gradient."""
    chosen_error: Tensor
    """(B,) mean squared error of the chosen samples, e_w."""
    rejected_error: Tensor
    """(B,) mean squared error of the rejected samples, e_l."""
    logits: Tensor
    """(B,) what enters logσ (for `sft`, which has none: e_l − e_w)."""
    correct: Tensor
    """(B,) bool, logits > 0: the model denoises the chosen sample better."""


def paired_loss(
    prediction: TensorOrPair,
    target: TensorOrPair,
    *,
    objective: str = "mapo_code",
    beta: float = 0.1,
    snr: float = 0.5,
    num_train_timesteps: float = 1000,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> PairedLoss:
    """Preference loss of B (chosen, rejected) pairs from a denoiser's predictions and targets.

    Args:
        prediction: (2B, …), chosen half first, or a (chosen, rejected) tuple of (B, …) tensors; fp16, bf16,
            fp32 or fp64, any strides. Usually (2B, C, H, W).
        target: as `prediction`, in either form; its dtype may differ. It gets no gradient.
        objective: one of `OBJECTIVES`; formulas and sources in `mapo_kernels.objectives`.
        beta: β of the MaPO objectives.
        snr: λ of `mapo_code`; the others ignore it.
        num_train_timesteps: T of `mapo_code`; the others ignore it.
        weights: (B,); multiplies each pair's whole loss. The mean still divides by B.
        mask: broadcastable to the samples, (2B or B or 1, C or 1, H or 1, W or 1), bool or floating;
            e = Σ m·d² / Σ m, a broadcast mask counted once per element. (B, …) and (1, …) serve both halves.
            A sample whose mask is all zero has no error: 0/0 = NaN. A NaN under a zero mask is still NaN.
        reduction: `"mean"` over the pairs, or `"none"`.

    Returns:
        A `PairedLoss`. NaN or Inf in a sample makes its error, its pair's logit and gradients and the mean
        loss non-finite; other pairs' outputs do not change. Nothing waits for the GPU.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting does not fit; the message names it.
    """
    check_scalars(objective, beta, snr, num_train_timesteps, reduction)
    chosen, rejected, target_w, target_l = check_inputs(prediction, target, weights, mask)
    loss, errors, logits, correct, _ = _paired_loss_op(
        chosen,
        rejected,
        target_w,
        target_l,
        weights,
        mask,
        objective,
        float(beta),
        float(snr),
        float(num_train_timesteps),
        reduction == "none",
    )
    e_w, e_l = errors.detach().chunk(2)
    return PairedLoss(loss, e_w, e_l, logits.detach(), correct)


def paired_loss_from_errors(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    objective: str = "mapo_code",
    beta: float = 0.1,
    snr: float = 0.5,
    num_train_timesteps: float = 1000,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> PairedLoss:
    """`paired_loss` for callers who already have the (B,) errors; differentiable in both of them.

    Errors keep more of a margin in fp32 than in half precision: a bf16 error has 3 digits, and T = 1000
    multiplies what is missing. Raises as `paired_loss` does.
    """
    check_scalars(objective, beta, snr, num_train_timesteps, reduction)
    for name, error in (("chosen_error", chosen_error), ("rejected_error", rejected_error)):
        if not isinstance(error, Tensor) or error.dtype not in FLOATING:
            raise TypeError(f"{name}: pass a floating-point tensor of shape (B,)")
        if error.ndim != 1 or error.numel() == 0:
            raise ValueError(
                f"{name}: shape {tuple(error.shape)} is not (B,) with B >= 1; reduce each sample first"
            )
    if chosen_error.shape != rejected_error.shape or chosen_error.device != rejected_error.device:
        raise ValueError(
            f"rejected_error: {tuple(rejected_error.shape)} on {rejected_error.device} does not match "
            f"chosen_error: {tuple(chosen_error.shape)} on {chosen_error.device}; both must be (B,)"
        )
    check_weights(weights, chosen_error.shape[0], chosen_error.device)
    loss, logits, correct, _ = _from_errors_op(
        chosen_error,
        rejected_error,
        weights,
        objective,
        float(beta),
        float(snr),
        float(num_train_timesteps),
        reduction == "none",
    )
    acc = logits.dtype
    return PairedLoss(
        loss, chosen_error.detach().to(acc), rejected_error.detach().to(acc), logits.detach(), correct
    )


def _reference_log_score(z: Tensor) -> Tensor:
    """log(z/(exp z − 1)) for z ≥ 0, in a form that autograd can differentiate without cancellation."""
    small = z < 1e-3
    x = torch.where(small, 1.0, z)
    series = torch.log1p(-z / 2 + z**2 / 12 - z**4 / 720)
    return torch.where(small, series, torch.log(x) - x - torch.log(-torch.expm1(-x)))


def _reference_terms(
    e_w: Tensor, e_l: Tensor, objective: str, beta: float, snr: float, timesteps: float
) -> tuple[Tensor, Tensor]:
    """Return each pair's loss and logit."""
    if objective == "sft":
        return e_w, e_l - e_w
    if objective == "mapo_code":
        s_w, s_l = (_reference_log_score(snr * e).exp() for e in (e_w, e_l))
        logits = timesteps * (s_w - s_l)
        return e_w - beta * torch.nn.functional.logsigmoid(logits), logits
    if objective == "mapo_paper_power":
        phi_w, phi_l = ((beta * _reference_log_score(e)).exp() for e in (e_w, e_l))
    else:
        phi_w, phi_l = (beta * _reference_log_score(e).exp() for e in (e_w, e_l))
    return e_w - torch.nn.functional.logsigmoid(phi_w - phi_l) / beta, phi_w - phi_l


def paired_loss_reference(
    prediction: TensorOrPair,
    target: TensorOrPair,
    *,
    objective: str = "mapo_code",
    beta: float = 0.1,
    snr: float = 0.5,
    num_train_timesteps: float = 1000,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> PairedLoss:
    """The definition of `paired_loss`, in fp64 throughout and differentiated by autograd. Slow; for tests."""
    p, t = (x if isinstance(x, Tensor) else torch.cat(list(x)) for x in (prediction, target))
    square = (p.double() - t.double()) ** 2
    if mask is None:
        m = torch.ones_like(square)
    else:
        both = mask if mask.shape[0] in (1, len(p)) else torch.cat([mask, mask])
        m = both.double().expand_as(square)
    e_w, e_l = ((m * square).flatten(1).sum(1) / m.flatten(1).sum(1)).chunk(2)
    loss, logits = _reference_terms(e_w, e_l, objective, beta, snr, num_train_timesteps)
    if weights is not None:
        loss = loss * weights.double()
    if reduction == "mean":
        loss = loss.mean()
    return PairedLoss(loss, e_w.detach(), e_l.detach(), logits.detach(), logits.detach() > 0)
