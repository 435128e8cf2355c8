"""LoRAs added to a model's weights: W + weight · (alpha / rank) · up · down, in fp64, rounded once.

Nothing is computed here: a part remembers what is added to which tensor, and adds it as the tensor is loaded
or written. So a merged model needs no more memory than another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mapo_fast.models.lora_file import LoraFile, LoraLayer, read_lora
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.util.errors import UserError


@dataclass(frozen=True)
class _Weighted:
    """A layer of a LoRA, scaled by a weight."""

    layer: LoraLayer
    weight: float

    def product(self, shape: tuple[int, ...]) -> Tensor:
        """weight · scale · up · down in fp64."""
        return self.layer.product(shape).mul_(self.weight)

    def identity(self) -> list[Any]:
        """Identity of the weighted product, from a sample of the factors."""
        return [*self.layer.identity(), self.weight]


def with_loras(model: Pipeline, loras: Iterable[tuple[Path, float]]) -> Pipeline:
    """The model with LoRAs added at their weights, in this order.

    Raises:
        UserError: a file is not a LoRA for the model, or is for another prediction.
    """
    for path, weight in loras:
        model = with_lora(model, read_lora(path, model.parts), weight)
    return model


def without_loras(model: Pipeline) -> Pipeline:
    """The model as its folder or file has it."""
    parts = {name: replace(part, added={}) for name, part in model.parts.items()}
    return replace(model, parts=parts, start=None)


def with_start_lora(model: Pipeline, lora: LoraFile | None) -> Pipeline:
    """The model whose text encoders have the LoRA that training goes on from, and that knows it.

    Raises:
        UserError: the LoRA is for another prediction than the model's.
    """
    if lora is None:
        return model
    texts = {component: layers for component, layers in lora.parts.items() if component != "unet"}
    return replace(with_lora(model, replace(lora, parts=texts), 1.0), start=lora)


def with_lora(model: Pipeline, lora: LoraFile, weight: float) -> Pipeline:
    """The model with a LoRA added at a weight.

    Raises:
        UserError: the LoRA's metadata names another prediction than the model's.
    """
    predicts = str(model.scheduler_config.get("prediction_type", "epsilon"))
    if lora.prediction is not None and lora.prediction != predicts:
        raise UserError(
            f"{lora.path} is for {lora.prediction} by its metadata, {model.path} predicts {predicts}: what a "
            "LoRA learnt for one is wrong for the other"
        )
    parts = dict(model.parts)
    for component, layers in lora.parts.items():
        added = dict(parts[component].added)
        for layer, factors in layers.items():
            name = f"{layer}.weight"
            added[name] = (*added.get(name, ()), _Weighted(factors, weight))
        parts[component] = replace(parts[component], added=added)
    return replace(model, parts=parts)
