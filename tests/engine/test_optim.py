"""A step that is not finite changes nothing, is counted, and needs no host wait."""

from __future__ import annotations

import pytest
import torch

from mapo_fast.engine.build import learning_rate
from mapo_fast.engine.optim import GuardedOptimizer, build_optimizer
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_fast.settings.schema import OptimConfig


def _guarded(
    name: str, max_grad_norm: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[GuardedOptimizer, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5000, 7)]
    optimizer = build_optimizer(OptimConfig(name=name, lr=1e-2), parameters)
    return GuardedOptimizer(optimizer, parameters, max_grad_norm=max_grad_norm, scaler=None), parameters


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_is_skipped_and_counted(name: str) -> None:
    guarded, parameters = _guarded(name)

    def snapshot() -> list[torch.Tensor]:
        states = [t for p in parameters for t in guarded.optimizer.state[p].values() if torch.is_tensor(t)]
        return [t.detach().clone() for t in (*parameters, *states)]

    def step(bad: bool) -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        if bad:
            assert parameters[0].grad is not None
            parameters[0].grad[3] = float("nan")
        guarded.step()

    step(bad=False)
    before = snapshot()
    step(bad=True)
    step(bad=True)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    assert (float(guarded.skipped), float(guarded.skipped_in_a_row)) == (2, 2)
    assert all(p.grad is None for p in parameters)
    step(bad=False)
    assert not torch.equal(before[0], parameters[0])
    assert (float(guarded.skipped), float(guarded.skipped_in_a_row)) == (2, 0)


def test_the_update_is_clipped_as_configured() -> None:
    p = torch.nn.Parameter(torch.zeros(5000))
    p.grad = torch.ones_like(p)
    build_optimizer(OptimConfig(name="adamw8bit", lr=0.5, max_update_rms=0.25), [p]).step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.125))


def test_the_norm_is_the_one_before_clipping_and_zero_means_no_clipping() -> None:
    for limit, expected in ((1.0, 1.0), (0.0, 5.0)):
        guarded, parameters = _guarded("adamw", max_grad_norm=limit)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        gradient = parameters[1].grad
        assert gradient is not None
        gradient[0], gradient[1] = 3.0, 4.0
        assert float(guarded.step()) == pytest.approx(5.0)
        assert float(gradient.norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_norm_is_not_rounded_to_bf16(name: str, dtype: torch.dtype, rel: float) -> None:
    guarded, parameters = _guarded(name, dtype=dtype)
    for p in parameters:
        p.grad = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(p.numel()))
    gradients = [p.grad.to(torch.float64, copy=True) for p in parameters if p.grad is not None]
    norm = guarded.step()
    assert float(norm) == pytest.approx(float(torch.cat(gradients).norm()), rel=rel)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_is_that_of_clipped_gradients(dtype: torch.dtype) -> None:
    """Whether AdamW divides as it reads them, or, in fp64, a pass before it does."""
    guarded, parameters = _guarded("adamw", max_grad_norm=0.5, dtype=dtype)
    expected = [p.detach().clone().requires_grad_() for p in parameters]
    plain = torch.optim.AdamW(
        expected, **{k: guarded.optimizer.defaults[k] for k in ("lr", "betas", "eps", "weight_decay")}
    )
    for size in (1.0, 30.0, 1e-4):  # of the gradients: Adam forgets a factor that is the same in every step
        for p, q in zip(parameters, expected, strict=True):
            p.grad = size * torch.randn_like(p)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(expected, 0.5)
        plain.step()
        guarded.step()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for p, q in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_clipping_inside_the_step_is_clipping(limit: float) -> None:
    """adamw8bit reads the gradients once: they stay as they are, and the update is that of clipped ones."""
    guarded, parameters = _guarded("adamw8bit", max_grad_norm=limit)
    plain, expected = _guarded("adamw8bit", max_grad_norm=0.0)
    for p, q in zip(parameters, expected, strict=True):
        q.data.copy_(p.data)
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in parameters]
        for p, q, g in zip(parameters, expected, gradients, strict=True):
            p.grad, q.grad = g, g.clone()
        if limit:
            torch.nn.utils.clip_grad_norm_(expected, limit)
        norm = torch.nn.utils.get_total_norm(gradients)
        kept = [g.clone() for g in gradients]
        assert torch.equal(guarded.step(), norm)
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    for p, q in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_learning_rate_follows_the_schedule() -> None:
    rate = learning_rate(OptimConfig(lr=2e-4, schedule="cosine", warmup_steps=10), steps=110)
    assert rate(0) == 0.0
    assert rate(5) == pytest.approx(1e-4)
    assert rate(10) == pytest.approx(2e-4)
    assert rate(60) == pytest.approx(1e-4)
    assert rate(110) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(OptimConfig(lr=3e-5, schedule="constant"), steps=5)(4) == 3e-5
    polynomial = learning_rate(OptimConfig(lr=1e-4, schedule="polynomial"), steps=100)
    assert 0 < polynomial(50) < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_gradient_scaler_changes_nothing_but_the_skipping(name: str) -> None:
    """What fp16 runs do on a GPU: scaled losses, an overflow skips the step and halves the scale."""
    plain, expected = _guarded(name)
    scaled, parameters = _guarded(name)
    for p, e in zip(parameters, expected, strict=True):
        p.data.copy_(e.data)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for target in (1.0, 2.0):
        for guarded, group in ((plain, expected), (scaled, parameters)):
            guarded.backward(sum(((p - target) ** 2).sum() for p in group))  # type: ignore[arg-type]
            guarded.step()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-7)
    assert scaled.scaler.get_scale() == 2048.0
    before = parameters[0].detach().clone()
    scaled.backward((parameters[0] * float("inf")).sum() + parameters[1].sum())
    scaled.step()
    assert torch.equal(parameters[0], before)
    assert scaled.scaler.get_scale() == 1024.0
    assert (float(scaled.skipped), float(scaled.skipped_in_a_row)) == (1, 1)
