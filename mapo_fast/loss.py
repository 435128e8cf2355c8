"""The fused losses as modules: `MaPOLoss`, its control `SFTLoss`, and `PreferenceLoss`; `KTOLoss` of single
images in plain torch. Needs torch only.

loss_fn = MaPOLoss(form="code", beta=0.1)
out = loss_fn(prediction, target)      # (2B, C, H, W) each, the B chosen samples first
out.loss.backward()

loss_fn = PreferenceLoss("dpo", beta=5000)
out = loss_fn(prediction, target, reference_errors=errors)  # (2B,): a frozen model's mean squared errors
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mapo_kernels import NoiseTarget, PairedLoss, paired_loss, paired_loss_from_errors
from mapo_kernels.objectives import OBJECTIVES, objective_key, resolve
from mapo_kernels.ops.paired_loss import check_settings
from mapo_kernels.terms import Samples

TensorOrPair = Tensor | tuple[Tensor, Tensor]


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {value!r} is not a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value!r} must be positive and finite")


class PairLoss(nn.Module):
    """Base class of the paired losses: holds the settings and calls `paired_loss`."""

    def __init__(self, settings: dict[str, Any], reduction: str) -> None:
        super().__init__()
        _choice("reduction", reduction, ("mean", "none"))
        self._settings = {**settings, "reduction": reduction}

    def forward(
        self,
        prediction: TensorOrPair,
        target: TensorOrPair | NoiseTarget,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        reference_errors: TensorOrPair | None = None,
        labels: Tensor | None = None,
        kto_baseline: Tensor | None = None,
    ) -> PairedLoss:
        """Return loss, chosen_error, rejected_error, logits and correct of B pairs.

        Args:
            prediction: (2B, C, H, W), the chosen half first, or a (chosen, rejected) tuple of (B, C, H, W);
                fp16, bf16, fp32 or fp64, any strides, any number of sample dimensions.
            target: as `prediction`, in either form and its own dtype; what the denoiser should have predicted
                (ε, v, or ε − x₀). It gets no gradient. Or a `NoiseTarget`, which makes it again from the
                noise's keys.
            weights: (B,); multiplies each pair's whole loss. The mean still divides by B.
            mask: bool or floating, (2B or B or 1, C or 1, H or 1, W or 1); errors become Σ m·d² / Σ m.
                A sample with an all-zero mask has error NaN.
            reference_errors: (2B,), the chosen half first, or two (B,): a frozen model's mean squared errors
                on the same samples, for the objectives that compare with one; the others refuse them.
            labels: (B,), how probably the chosen sample really is the better one; see `paired_loss`.
            kto_baseline: one element, for `kto` only; see `paired_loss`.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit; the message names the argument.
        """
        return paired_loss(
            prediction,
            target,
            weights=weights,
            mask=mask,
            reference_errors=reference_errors,
            labels=labels,
            kto_baseline=kto_baseline,
            **self._settings,
        )

    def from_errors(
        self,
        chosen_error: Tensor,
        rejected_error: Tensor,
        weights: Tensor | None = None,
        *,
        reference_errors: TensorOrPair | None = None,
        labels: Tensor | None = None,
        kto_baseline: Tensor | None = None,
    ) -> PairedLoss:
        """Return the outputs of `forward` from (B,) mean squared errors (fp32 or better), differentiable."""
        return paired_loss_from_errors(
            chosen_error,
            rejected_error,
            weights=weights,
            reference_errors=reference_errors,
            labels=labels,
            kto_baseline=kto_baseline,
            **self._settings,
        )


class MaPOLoss(PairLoss):
    """Margin-aware preference optimization without a reference model (arXiv 2406.06424).

    With e_w, e_l the mean squared errors of the chosen and the rejected sample:

    - `form="code"`, as the authors released it: mean(e_w − β·logσ(T·(s(e_w) − s(e_l)))) with
      s(x) = λx/(exp(λx) − 1).
    - `form="paper"`, eq. 9–11: mean(e_w − logσ(φ(e_w) − φ(e_l))/β), where φ(x) is (x/(exp x − 1))^β with
      `reading="power"` and β·x/(exp x − 1) with `reading="scale"`.

    The two are different objectives: at zero margin the code form pulls 50 times harder with its defaults.

    Args:
        form: `"code"` or `"paper"`.
        reading: how the paper's φ is read; the code form ignores it.
        beta: β. The code's default is 0.1; the paper's best values run from 8 (preference) to 1024.
        snr: λ of the code form.
        num_train_timesteps: T of the code form.
        reduction: `"mean"`, or `"none"` for a (B,) loss.
    """

    def __init__(
        self,
        form: Literal["code", "paper"] = "code",
        reading: Literal["power", "scale"] = "power",
        beta: float = 0.1,
        snr: float = 0.5,
        num_train_timesteps: int = 1000,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        _choice("form", form, ("code", "paper"))
        _choice("reading", reading, ("power", "scale"))
        for name, value in (("beta", beta), ("snr", snr), ("num_train_timesteps", num_train_timesteps)):
            _positive(name, value)
        self.form = form
        self.reading = reading
        objective = objective_key("mapo", form=form, reading=reading)
        super().__init__(
            {"objective": objective, "beta": beta, "snr": snr, "num_train_timesteps": num_train_timesteps},
            reduction,
        )

    def extra_repr(self) -> str:
        """Show the settings in `print(module)`."""
        s = self._settings
        if self.form == "code":
            form = f"form='code', beta={s['beta']}, snr={s['snr']}"
            form += f", num_train_timesteps={s['num_train_timesteps']}"
        else:
            form = f"form='paper', reading='{self.reading}', beta={s['beta']}"
        return f"{form}, reduction='{s['reduction']}'"


class SFTLoss(PairLoss):
    """Supervised fine-tuning on the chosen samples alone, mean(e_w): the control for a preference loss.

    Same call and same outputs as `MaPOLoss`; `logits` is the plain margin e_l − e_w.

    Args:
        reduction: `"mean"`, or `"none"` for a (B,) loss.
    """

    def __init__(self, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__({"objective": "sft"}, reduction)

    def extra_repr(self) -> str:
        """Show the settings in `print(module)`."""
        return f"reduction='{self._settings['reduction']}'"


class PreferenceLoss(PairLoss):
    """Any paired objective by its name: Diffusion-DPO, IPO, SmPO, DMPO, Linear-DPO, ORPO, SimPO, CPO, ….

    Same call and same outputs as `MaPOLoss`; objectives that compare with a frozen reference need its errors.
    Names, formulas and sources are in `mapo_kernels.objectives`; defaults in `mapo_kernels.OBJECTIVES`.

    Args:
        objective: a key of `OBJECTIVES`.
        reduction: `"mean"`, or `"none"` for a (B,) loss.
        **settings: the objective's own; what is left out has its default.
    """

    def __init__(
        self, objective: str, reduction: Literal["mean", "none"] = "mean", **settings: float
    ) -> None:
        _choice("objective", objective, tuple(OBJECTIVES))
        check_settings(objective, settings, reduction)
        super().__init__({"objective": objective, **settings}, reduction)

    def extra_repr(self) -> str:
        """Show the settings in `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())


class UnpairedLoss(NamedTuple):
    """Loss and diagnostics of n single samples, on their device; fp64 if the errors are, else fp32."""

    loss: Tensor
    """(); the only output that carries a gradient."""
    errors: Tensor
    """(n,) mean squared errors e."""
    wanted: Tensor
    """(n,) bool, the labels."""
    logits: Tensor
    """(n,) z = ±β(g − k), + for a wanted sample."""
    correct: Tensor
    """(n,) bool, z > 0: the model has improved more than k on a wanted sample, or less on an unwanted one."""

    @property
    def halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Errors of the wanted and of the unwanted samples, (n,) each, 0 for the others; 1 where one is."""
        wanted = self.wanted.to(self.logits.dtype)
        return (self.errors * wanted, wanted), (self.errors * (1 - wanted), 1 - wanted)

    @property
    def pairs(self) -> float:
        """Number of pairs for averages: two samples count as a pair."""
        return len(self.logits) / 2


class SampleLoss(nn.Module):
    """An objective of single samples, each wanted or not, by its name; n scalars in fp64.

    Args:
        objective: a key of `OBJECTIVES` that has terms of single samples.
        **settings: the objective's own; what is left out has its default.
    """

    def __init__(self, objective: str, **settings: float) -> None:
        super().__init__()
        _choice("objective", objective, tuple(name for name, known in OBJECTIVES.items() if known.single))
        self.objective = objective
        values = check_settings(objective, settings, "mean")
        self._settings = dict(zip(OBJECTIVES[objective].settings, values, strict=False))

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        *,
        reference_errors: Tensor | None = None,
        labels: Tensor,
        baseline: Callable[[Tensor], Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> UnpairedLoss:
        """Return loss, errors and logits of n samples.

        Args:
            prediction: (n, C, H, W), fp16, bf16, fp32 or fp64.
            target: as `prediction`, in its own dtype.
            reference_errors: (n,), a frozen model's mean squared errors on the same samples, for an objective
                that compares with one.
            labels: (n,) bool, which are wanted.
            baseline: gives k, 0-d, from the (n,) detached g; by default that of these samples alone.
            weights: (n,); multiplies each sample's whole loss. The mean still divides by n.

        Raises:
            ValueError: the objective needs reference errors, or has none.
        """
        dtype = torch.promote_types(target.dtype, torch.float32)
        errors = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
        return self._of(errors, reference_errors, labels, baseline, weights)

    def from_errors(
        self,
        first: Tensor,
        second: Tensor,
        *,
        reference_errors: Tensor | None = None,
        labels: Tensor,
        baseline: Callable[[Tensor], Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> UnpairedLoss:
        """Return the outputs of `forward` from the errors of the first and the second half of the samples."""
        return self._of(torch.cat([first, second]), reference_errors, labels, baseline, weights)

    def _of(
        self,
        errors: Tensor,
        reference_errors: Tensor | None,
        labels: Tensor,
        baseline: Callable[[Tensor], Tensor] | None,
        weights: Tensor | None,
    ) -> UnpairedLoss:
        known = OBJECTIVES[self.objective]
        if known.reference != (reference_errors is not None):
            needs = "needs them" if known.reference else "has no reference model"
            raise ValueError(f"reference_errors: {self.objective!r} {needs}")
        e = errors.double()
        gains = (torch.zeros_like(e) if reference_errors is None else reference_errors.double()) - e
        k = (baseline or _mean_gain)(gains.detach()) if known.baseline else None
        terms, z = resolve(known.single)(Samples(e, gains, labels, k), *self._settings.values())
        terms = terms + 0.0 * z  # a saturated sigmoid would hide an infinite error
        terms = terms if weights is None else terms * weights.double()
        logits = z.detach().to(errors.dtype)
        return UnpairedLoss(terms.mean().to(errors.dtype), errors.detach(), labels, logits, logits > 0)

    def extra_repr(self) -> str:
        """Show the settings in `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())


class KTOLoss(SampleLoss):
    """Diffusion-KTO on single samples, each wanted or not.

    With e a sample's mean squared error, r the same of a frozen reference and g = r − e:

        mean of w·(1 − σ(z)),  z = β(g − k) and w = `desirable_weight` for a wanted sample,
                               z = −β(g − k) and w = `undesirable_weight` for another,

    where k, the mean of g over the samples of an optimizer step and at least 0, is taken as a number. For
    pairs, `PreferenceLoss("kto")` computes the same, with the mean over both halves. n scalars in fp64.

    Args:
        beta: β.
        desirable_weight: weight of wanted samples.
        undesirable_weight: weight of the others.
    """

    def __init__(
        self, beta: float = 1000.0, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        super().__init__(
            "kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        )


def _mean_gain(gains: Tensor) -> Tensor:
    return gains.mean().clamp(min=0.0)


Loss = PairLoss | SampleLoss
LossOutput = PairedLoss | UnpairedLoss
"""Return type of a loss; both kinds have `halves` and `pairs`."""
