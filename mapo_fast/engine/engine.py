"""One optimizer step as the settings plan it: micro-batches in, changed weights out.

The trainer and the planner's trace use the same `Engine`, so that what is predicted is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mapo_fast.engine.baseline import Baseline
from mapo_fast.engine.build import TrainingUnet
from mapo_fast.engine.fused_step import FusedStep
from mapo_fast.engine.gradient_sums import GradientSums
from mapo_fast.engine.graphs import StepGraphs, check_capture
from mapo_fast.engine.optim import GuardedOptimizer, build_optimizer
from mapo_fast.engine.optimizers import Fusable
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.processes import ALONE, Processes
from mapo_fast.engine.reference import StartModel
from mapo_fast.engine.sequential import sequential_backward
from mapo_fast.engine.shard import ShardedOptimizer
from mapo_fast.engine.step import PairInputs, predict
from mapo_fast.engine.stream_states import StateStreaming
from mapo_fast.loss import Loss, LossOutput
from mapo_fast.settings.schema import Config


class Engine:
    """Forward, backward and update of one run.

    Args:
        config: the run's settings.
        parts: the UNet that `build_unet` or `prepare_unet` made for these settings.
        loss: the objective, as `build_loss` makes it.
        precision: storage and arithmetic types of the run.
        device: where the UNet computes.
        processes: the run's processes; each gives its micro-batches, and all take the same step.
    """

    def __init__(
        self,
        config: Config,
        parts: TrainingUnet,
        loss: Loss,
        precision: Precision,
        device: torch.device,
        processes: Processes = ALONE,
        *,
        weights: Tensor | None = None,
    ) -> None:
        self.config, self.parts, self.loss = config, parts, loss
        self._weights = weights
        """(T,) weights of the timesteps, on the device; None where all are 1."""
        self.precision, self.device, self.processes = precision, device, processes
        self.unet = parts.unet
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        alone = config.train.pairs_per_batch == config.train.accumulation == 1
        # The second set of gradients is small with a LoRA, and not needed where a step has one pair.
        self._sharded = processes.shard(config)
        self._scratch = config.adapter.kind == "lora" or (alone and not self._sharded)
        self.baseline: Baseline | None = None
        if config.objective.known.baseline:
            self.baseline = Baseline(config.train.accumulation, device, processes)
            self._scratch = False  # each coefficient depends on every sample of the micro-batch
        self.changing = False
        """Whether an update is under way: weights and states may be those of a half-made step."""
        self.scaler = torch.amp.GradScaler(device.type) if precision.scaled else None
        build = partial(build_optimizer, config.optim, seed=config.train.seed)
        self.optimizer: GuardedOptimizer | FusedStep
        if self._sharded:
            self.optimizer = ShardedOptimizer(
                build, self.parameters, max_grad_norm=config.optim.max_grad_norm, processes=processes
            )
        elif config.train.fused_step:
            optimizer = build(self.parameters)
            assert isinstance(optimizer, Fusable)  # a rule says so
            states = StateStreaming(optimizer, parts.transfers) if config.offload.optimizer == "cpu" else None
            self.optimizer = FusedStep(
                optimizer,
                self.parameters,
                max_grad_norm=config.optim.max_grad_norm,
                states=states,
                weights=parts.weights,
            )
        else:
            self.optimizer = GuardedOptimizer(
                build(self.parameters),
                self.parameters,
                max_grad_norm=config.optim.max_grad_norm,
                scaler=self.scaler,
            )

        self._sums: GradientSums | None = None
        if config.train.accumulation > 1 and precision.trainable == torch.bfloat16 and not self._sharded:
            self._sums = GradientSums(self.parameters, config.train.seed)
        self._lr: Tensor | None = None
        self._graphs: StepGraphs | None = None
        check_capture(config, device)
        if config.speed.cuda_graph:
            self._capture_steps(StepGraphs)

    def _capture_steps(self, graphs: type[StepGraphs]) -> None:
        """From now on run whole steps as CUDA graphs."""
        optimizer = self.optimizer.optimizer
        for group in optimizer.param_groups:
            group["capturable"] = True  # torch's own optimizers ask for it
        self._lr = torch.zeros((), dtype=getattr(optimizer, "lr_dtype", torch.float32), device=self.device)
        self._norm: Tensor | None = None
        keep = getattr(optimizer, "take_captured", lambda: None)
        self._graphs = graphs(self._whole_step, self.device, keep)

    def start(self, lr: float, step: int = 0) -> None:
        """Begin optimizer step number `step`, on which rounding depends, at learning rate `lr`."""
        if self._sums is not None:
            self._sums.start(step)
        if self.baseline is not None:
            self.baseline.begin()
        if self._lr is not None:
            self._lr.fill_(lr)
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = lr if self._lr is None else self._lr

    def accumulate(
        self,
        inputs: PairInputs,
        share: float,
        *,
        reference_errors: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LossOutput:
        """Forward and backward of one micro-batch, which is `share` of the step's pairs.

        Args:
            inputs: B pairs, or 2B single samples.
            share: the micro-batch's fraction of the step's pairs.
            reference_errors: (2B,) precomputed errors of the start model, chosen half first; without them
                the start model of `parts`, if there is one, makes them.
            labels: (B,) soft labels, for an objective that needs them. For single samples (2B,) bool: which
                of them are wanted.

        Returns:
            The micro-batch's loss, errors and logits.
        """
        self.changing = self._graphs is not None or isinstance(self.optimizer, FusedStep)
        if self._graphs is not None:
            out, self._norm = self._graphs((*inputs, reference_errors, labels))
            return out  # type: ignore[no-any-return]
        return self._accumulate(inputs, share, reference_errors, labels)

    def _whole_step(self, tensors: Sequence[Tensor | None]) -> tuple[LossOutput, Tensor]:
        *inputs, reference_errors, labels = tensors
        out = self._accumulate(PairInputs(*inputs), 1.0, reference_errors, labels)  # type: ignore[arg-type]
        return out._replace(loss=out.loss.detach()), self._finish()

    def _accumulate(
        self, inputs: PairInputs, share: float, reference_errors: Tensor | None, labels: Tensor | None
    ) -> LossOutput:
        if reference_errors is None and self.parts.start is not None:
            reference_errors = self.errors_of(self.parts.start, inputs)
        named: dict[str, Any] = {"reference_errors": reference_errors, "labels": labels}
        named |= {"baseline": self.baseline, "weights": self._weights_of(inputs)}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.config.train.layout == "sequential":
            return sequential_backward(
                self.unet,
                inputs,
                self.loss,
                self.parameters,
                weight=share,
                scratch=self._scratch,
                scale=self.scaler,
                context=self.precision.context(self.device),
                sums=self._sums,
                given=given,
            )
        with self.precision.context(self.device):
            prediction = predict(self.unet, inputs)
        out: LossOutput = self.loss(prediction, inputs.target, **given)
        del prediction  # the loss keeps what it needs
        with nullcontext() if self._sums is None else self._sums.adding():
            self.optimizer.backward(out.loss * share)
        return out

    def _weights_of(self, inputs: PairInputs) -> Tensor | None:
        """(B,) weights of pairs, whose halves have one timestep, or (2B,) of single samples."""
        if self._weights is None:
            return None
        single = self.config.objective.known.samples == "single"
        return self._weights[inputs.timesteps if single else inputs.timesteps[: len(inputs.timesteps) // 2]]

    def errors_of(self, start: StartModel, inputs: PairInputs) -> Tensor:
        """(2B,) errors of the start model, with as many samples at once as the step takes."""
        sequential = self.config.train.layout == "sequential"
        at_once = 0 if not sequential else 1 if self._scratch else len(inputs.noisy) // 2
        if self.baseline is not None and not sequential:
            at_once = len(inputs.noisy)  # reduced as the loss does
        return start.errors(inputs, self.precision.context(self.device), at_once)

    def finish(self) -> Tensor:
        """Complete the optimizer step; returns its 0-d gradient norm on the device."""
        if self._graphs is not None:
            assert self._norm is not None
            norm = self._norm
        else:
            norm = self._finish()
        self.changing = False
        return norm

    def drop(self) -> None:
        """Forget the step that was begun, where nothing is `changing` yet."""
        if self.baseline is not None:
            self.baseline.drop()

    def _finish(self) -> Tensor:
        if not self._sharded:  # gradients of shards are summed in backward
            self.processes.sum_gradients(self.parameters)
        self.changing = True
        norm = self.optimizer.step()
        if self.parts.activations is not None:
            self.parts.activations.reset()
        return norm
