"""One or more small calls of every operator, for the contract that all of them keep: test_contract.py.

A new operator gets its calls here; a test fails until it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mapo_kernels import (
    FrozenWeight,
    Lora,
    NoiseTarget,
    PairedLoss,
    Projection,
    add_rounded_,
    fp8_linear,
    frozen_conv2d,
    frozen_linear,
    geglu,
    geglu_linear,
    group_norm_silu,
    group_norm_silu_conv,
    layer_norm,
    layer_norm_linear,
    lora_linear,
    paired_loss,
    paired_loss_from_errors,
    paired_noise,
    paired_noise_epsilon,
)
from mapo_kernels.ops._adamw8bit_tensors import in_order
from mapo_kernels.ops.adamw8bit import adamw8bit_
from tests.kernels.linear_cases import frozen_projection, leaf, projection

F32 = torch.float32
IMAGE = (8, 3, 4)
"""Channels, height, width."""


class Call(NamedTuple):
    """An operator with operands for some units: rows, samples, pairs or parameters."""

    per_unit: list[Tensor]
    """Unit i of N has the entries i, i + N, … of the first dimension."""
    shared: list[Tensor]
    """Parameters of all units."""
    function: Callable[..., Sequence[Tensor]]
    """Function of `per_unit` and `shared`, in this order. Outputs hold the units as `per_unit` does."""


@dataclass(frozen=True)
class Operator:
    """How to call an operator."""

    name: str
    """The public name, and after a comma what is special about this call."""
    call: Callable[[int, str], Call]
    """Makes the call from a number of units and a device."""
    takes_nothing: bool = True
    """Whether there may be 0 units; if not, this is an error that says so."""

    def __str__(self) -> str:
        return self.name

    @property
    def public_name(self) -> str:
        return self.name.split(",")[0]


def rows(units: int, features: int, device: str) -> Tensor:
    return leaf(units, 5, features, device=device, dtype=F32)


def images(units: int, device: str) -> Tensor:
    return leaf(units, *IMAGE, device=device, dtype=F32)


def vectors(*sizes: int, device: str) -> list[Tensor]:
    return [leaf(n, device=device, dtype=F32) for n in sizes]


# --- One input, and layers ---


def call_geglu(units: int, device: str) -> Call:
    return Call([rows(units, 12, device)], [], lambda x: [geglu(x)])


def call_geglu_linear(units: int, device: str) -> Call:
    w, bias, lora, _ = projection(4, 6, device, F32, rank=2)
    assert lora is not None

    def function(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return [geglu_linear(x, Projection(w, bias, Lora(a, b, 0.7)))]

    return Call([rows(units, 12, device)], [w, bias, lora.a, lora.b], function)


def call_fp8_linear(units: int, device: str) -> Call:
    w, bias, *_ = projection(48, 32, device, F32)
    return Call([rows(units, 32, device)], [w, bias], lambda *t: [fp8_linear(*t)])


def call_frozen_linear(units: int, device: str) -> Call:
    weight, *_ = frozen_projection("nf4 nested", 8, 64, device, F32)
    return Call(
        [rows(units, 64, device)], vectors(8, device=device), lambda *t: [frozen_linear(t[0], weight, t[1])]
    )


def call_lora_linear(units: int, device: str) -> Call:
    w, bias, lora, _ = projection(4, 7, device, F32, rank=2)
    assert lora is not None
    return Call([rows(units, 7, device)], [w, bias, lora.a, lora.b], lambda *t: [lora_linear(*t, 0.7)])


def call_lora_linear_quantised(units: int, device: str) -> Call:
    weight, bias, lora, _ = frozen_projection("nf4 nested", 8, 64, device, F32)
    assert lora is not None

    def function(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return [lora_linear(x, weight, bias, a, b, 0.7)]

    return Call([rows(units, 64, device)], [lora.a, lora.b], function)


def call_layer_norm(units: int, device: str) -> Call:
    return Call([rows(units, 12, device)], vectors(12, 12, device=device), lambda *t: [layer_norm(*t)])


def call_layer_norm_residual(units: int, device: str) -> Call:
    def function(x: Tensor, residual: Tensor, *parameters: Tensor) -> list[Tensor]:
        return list(layer_norm(x, *parameters, residual=residual))

    return Call([rows(units, 12, device) for _ in range(2)], vectors(12, 12, device=device), function)


def call_layer_norm_linear(units: int, device: str) -> Call:
    (q, *_), (k, bias, lora, _) = projection(8, 12, device, F32), projection(4, 12, device, F32, rank=2)
    assert lora is not None

    def function(x: Tensor, *t: Tensor) -> list[Tensor]:
        norm, (q, k, bias, a, b) = t[:2], t[2:]
        return list(layer_norm_linear(x, *norm, [Projection(q), Projection(k, bias, Lora(a, b, 0.7))]))

    shared = [*vectors(12, 12, device=device), q, k, bias, lora.a, lora.b]
    return Call([rows(units, 12, device)], shared, function)


def call_layer_norm_linear_residual(units: int, device: str) -> Call:
    quantised = frozen_projection("nf4 nested", 8, 64, device, F32)

    def function(x: Tensor, residual: Tensor, *norm: Tensor) -> list[Tensor]:
        outputs, total = layer_norm_linear(x, *norm, [quantised], residual=residual)
        return [*outputs, total]

    return Call([rows(units, 64, device) for _ in range(2)], vectors(64, 64, device=device), function)


# --- Images ---


def codes(device: str) -> FrozenWeight:
    """A convolution's weight of five outputs."""
    weight = torch.randint(-127, 128, (5, 8, 3, 3), dtype=torch.int8).to(device)
    return FrozenWeight((weight, 0.1 * torch.rand(5, 2).to(device)), "int8 5 72")


def call_frozen_conv2d(units: int, device: str) -> Call:
    weight = codes(device)

    def function(x: Tensor, bias: Tensor) -> list[Tensor]:
        return [frozen_conv2d(x, weight, bias, stride=(2, 1), padding=(1, 0))]

    return Call([images(units, device)], vectors(5, device=device), function)


def call_group_norm_silu(units: int, device: str) -> Call:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [group_norm_silu(x, 2, weight, bias)]

    return Call([images(units, device)], vectors(8, 8, device=device), function)


def call_group_norm_silu_conv(units: int, device: str) -> Call:
    weight = leaf(5, 8, 3, 3, device=device, dtype=F32, scale=72**-0.5)

    def function(x: Tensor, *shared: Tensor) -> list[Tensor]:
        return [group_norm_silu_conv(x, 2, *shared)]

    return Call(
        [images(units, device)], [*vectors(8, 8, device=device), weight, *vectors(5, device=device)], function
    )


def call_group_norm_silu_conv_quantised(units: int, device: str) -> Call:
    weight = codes(device)

    def function(x: Tensor, *norm: Tensor) -> list[Tensor]:
        return [group_norm_silu_conv(x, 2, *norm, weight)]

    return Call([images(units, device)], vectors(8, 8, device=device), function)


# --- Pairs ---


def levels(units: int, device: str) -> list[Tensor]:
    """Keys of the noise, alphas and sigmas."""
    keys = torch.randint(-(2**63), 2**63 - 1, (units,)).to(device)
    return [keys, *(0.2 + torch.rand(2, units).to(device))]


def shown(out: PairedLoss) -> list[Tensor]:
    return [out.loss, out.chosen_error, out.rejected_error, out.logits]


def call_paired_loss(units: int, device: str) -> Call:
    prediction, target = (images(2 * units, device) for _ in range(2))

    def function(prediction: Tensor, target: Tensor) -> list[Tensor]:
        return shown(paired_loss(prediction, target, reduction="none", num_train_timesteps=3))

    return Call([prediction, target.detach()], [], function)


def call_paired_loss_reference(units: int, device: str) -> Call:
    """Everything at once: halves apart, a mask, weights, labels and a reference's prediction."""
    chosen, rejected, target, other = (images(units, device) for _ in range(4))
    mask, (weights, labels) = torch.rand(units, 1, *IMAGE[1:]).to(device), torch.rand(2, units).to(device)

    def function(
        chosen: Tensor, rejected: Tensor, target: Tensor, other: Tensor, *rest: Tensor
    ) -> list[Tensor]:
        mask, weights, labels = rest
        given: dict[str, Any] = {"mask": mask, "weights": weights, "labels": labels}
        out = paired_loss((chosen, rejected), (target, target), objective="dpo", beta=2.0, reduction="none",
                          reference_prediction=(other, other.sin()), **given)  # fmt: skip
        return shown(out)

    fixed = [target.detach(), other.detach(), mask, weights, labels]
    return Call([chosen, rejected, *fixed], [], function)


def call_paired_loss_from_keys(units: int, device: str) -> Call:
    prediction, latents = (images(2 * units, device) for _ in range(2))

    def function(prediction: Tensor, latents: Tensor, *level: Tensor) -> list[Tensor]:
        keys, alphas, sigmas = level
        target = NoiseTarget(keys, "v", latents, alphas, sigmas)
        return shown(paired_loss(prediction, target, reduction="none", num_train_timesteps=3))

    return Call([prediction, latents.detach(), *levels(units, device)], [], function)


def call_paired_loss_kto(units: int, device: str) -> Call:
    """With the reference's errors and a baseline."""
    prediction, (keys, *errors) = images(2 * units, device), levels(units, device)
    baseline = torch.tensor(0.1, device=device)

    def function(prediction: Tensor, keys: Tensor, *errors: Tensor) -> list[Tensor]:
        given: dict[str, Any] = {"reference_errors": errors, "kto_baseline": baseline, "beta": 2.0}
        out = paired_loss(prediction, NoiseTarget(keys), objective="kto", reduction="none", **given)
        return shown(out)

    return Call([prediction, keys, *errors], [], function)


def call_paired_loss_from_errors(units: int, device: str) -> Call:
    def function(*errors: Tensor) -> list[Tensor]:
        out = paired_loss_from_errors(*errors, reduction="none", num_train_timesteps=3)
        return [out.loss, out.logits]

    errors = [torch.rand(units).to(device).requires_grad_() for _ in range(2)]
    return Call(errors, [], function)


def call_paired_noise(units: int, device: str) -> Call:
    latents = [images(units, device).detach() for _ in range(2)]
    return Call([*latents, *levels(units, device)], [], lambda *t: [paired_noise(*t)])


def call_paired_noise_epsilon(units: int, device: str) -> Call:
    keys, *_ = levels(units, device)
    return Call([keys], [], lambda keys: [paired_noise_epsilon(keys, IMAGE)])


# --- In place ---


def call_add_rounded(units: int, device: str) -> Call:
    total = torch.randn(units, 5, 7).to(device, torch.bfloat16)

    def function(summand: Tensor) -> list[Tensor]:
        return [add_rounded_(total.clone(), summand, seed=3, tensor_id=1, number=2)]

    return Call([rows(units, 7, device).detach()], [], function)


def call_adamw8bit(units: int, device: str) -> Call:
    """A unit is a parameter and its state, large enough for 8 bits."""
    shape = (2, 2064)
    params = torch.randn(units, *shape).to(device)
    lr = torch.tensor(1e-2, dtype=torch.float64, device=device)

    def function(grads: Tensor) -> list[Tensor]:
        new = params.clone()
        moments = [torch.zeros_like(new, dtype=torch.uint8) for _ in range(2)]
        largest = [new.new_zeros(units, 17) for _ in range(2)]
        state = [*moments, *largest, torch.zeros(units, dtype=torch.int64, device=device)]
        ordered = [in_order(g, p) for g, p in zip(grads, new, strict=True)]
        adamw8bit_(list(new), ordered, *(list(each) for each in state), lr=lr)
        return [new, *state]

    return Call([leaf(units, *shape, device=device, dtype=F32, grad=False)], [], function)


OPERATORS = [
    Operator("AdamW8bit", call_adamw8bit),
    Operator("add_rounded_", call_add_rounded),
    Operator("fp8_linear", call_fp8_linear),
    Operator("frozen_conv2d", call_frozen_conv2d),
    Operator("frozen_linear", call_frozen_linear),
    Operator("geglu", call_geglu),
    Operator("geglu_linear", call_geglu_linear),
    Operator("group_norm_silu", call_group_norm_silu),
    Operator("group_norm_silu_conv", call_group_norm_silu_conv),
    Operator("group_norm_silu_conv, quantised", call_group_norm_silu_conv_quantised),
    Operator("layer_norm", call_layer_norm),
    Operator("layer_norm, residual", call_layer_norm_residual),
    Operator("layer_norm_linear", call_layer_norm_linear),
    Operator("layer_norm_linear, residual, quantised", call_layer_norm_linear_residual),
    Operator("lora_linear", call_lora_linear),
    Operator("lora_linear, quantised", call_lora_linear_quantised),
    Operator("paired_loss", call_paired_loss, takes_nothing=False),
    Operator("paired_loss, reference", call_paired_loss_reference, takes_nothing=False),
    Operator("paired_loss, from keys", call_paired_loss_from_keys, takes_nothing=False),
    Operator("paired_loss, kto", call_paired_loss_kto, takes_nothing=False),
    Operator("paired_loss_from_errors", call_paired_loss_from_errors, takes_nothing=False),
    Operator("paired_noise", call_paired_noise, takes_nothing=False),
    Operator("paired_noise_epsilon", call_paired_noise_epsilon, takes_nothing=False),
]
