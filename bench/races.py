"""Races, bounds and order: every op's kernels as launched on an RTX 4090, on small inputs, without a GPU.

    python -m bench.races            under Triton's interpreter and this repository's checker
    python -m bench.races --ttsem    under ttsem's, which executes the compiler's IR: `make races`

The first runs each case with the programs of every launch in order, in reverse and shuffled: all the bits of
outputs and gradients must agree, no access may lie outside the arguments, and no two programs may touch one
element, one of them writing, with nothing that orders them (`bench.watch`).

ttsem (PyPI) is an independent check of the same launches, on the IR that Triton's compiler makes. It knows
neither programs that synchronise nor addresses that come from memory: `NOT_BY_TTSEM` names the kernels that
it cannot check.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from bench import ROOT
from bench.cases import CASES, Case, New, cases, differentiable
from bench.dispatch import tensors
from mapo_kernels.hardware import INTERPRETING, Card, assume_card

CARD = Card(89, 4)
"""An RTX 4090's block sizes; few multiprocessors, so that programs of small grids still have several rows."""

MOST_ELEMENTS = 1 << 18


def small(op: str) -> list[Case]:
    """Cases that the interpreter can run whole: tiny ones, and corner cases that are not large."""
    meta = New(torch.device("meta"))
    return [
        case
        for case in cases(op, "compile")
        if "measure" not in case.uses and sum(x.numel() for x in tensors(case.inputs(meta))) <= MOST_ELEMENTS
    ]


def results(case: Case) -> list[Tensor]:
    """Outputs and gradients, or an optimizer's stepped parameters; the inputs are the same every time."""
    torch.manual_seed(0)
    new = New(torch.device("cpu"), fill=True)
    inputs = case.inputs(new)
    outputs = case.providers["ours"](*inputs)()
    if outputs is None:
        return tensors(inputs)
    found = [x.detach() for x in tensors(outputs)]
    wanted = differentiable(outputs)
    if wanted:
        found += torch.autograd.grad(wanted, differentiable(inputs), new.like(wanted))
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))


def interpreted(op: str) -> list[str]:
    """Run the op's small cases in three orders under the interpreter; returns errors by line."""
    from bench.watch import MemoryAccessError, MemoryChecker, watching

    class InOrder(MemoryChecker):
        def __init__(self, order: Callable[[Sequence[int]], Sequence[int]]) -> None:
            super().__init__()
            self.order = order

        def launch(self, *args: Any) -> Sequence[int]:
            return self.order(super().launch(*args))

    shuffle = random.Random(0)
    orders: dict[str, Callable[[Sequence[int]], Sequence[int]]] = {
        "in order": list,
        "reversed": lambda programs: programs[::-1],
        "shuffled": lambda programs: shuffle.sample(programs, len(programs)),
    }
    wrong = []
    for case in small(op):
        name = " ".join(case.key)
        first: list[Tensor] = []
        launches = 0
        for label, order in orders.items():
            checker = InOrder(order)
            try:
                with watching(checker), assume_card(CARD):
                    found = results(case)
            except InterpreterError as error:
                if not isinstance(error.__cause__, MemoryAccessError):
                    raise
                wrong.append(f"{name}, {label}: {error.__cause__}")
                break
            if checker.unchecked:
                wrong.append(f"{name}, {label}: {checker.unchecked} launches could not be checked")
            if first and not all(map(same_bits, first, found)):
                wrong.append(f"{name}, {label}: the order of the programs changes the result")
            first, launches = found, launches + checker.launches
        print(f"{name}: {launches} launches", flush=True)
    return wrong


NOT_BY_TTSEM = {
    "paired_loss": {
        "_forward_kernel": "its last program, found by an atomic counter, reads what the others wrote",
    },
    "adamw8bit": {
        "_advance_kernel": "it finds its tensors by addresses in a table; those after it are not reached",
    },
}
"""Kernels that ttsem cannot check, and why; `interpreted` checks them."""


def independent(op: str) -> list[str]:
    """Run the op's small cases under ttsem; returns its findings by line."""
    try:
        from ttsem import sanitize
    except ImportError as error:
        return [f"{op}: not checked, as ttsem cannot be imported ({error}); `make races` installs it"]

    wrong: list[str] = []
    unchecked: dict[str, str] = {}
    excused = NOT_BY_TTSEM.get(op, {})
    for case in small(op):
        name = " ".join(case.key)
        faults = []
        try:
            with sanitize.session(cuda_is_cpu=False, races="record") as state, assume_card(CARD):
                results(case)
            faults = state.races
            print(
                f"{name}: {state.launches} launches, {state.races_unchecked} too large for races", flush=True
            )
        except sanitize.KernelFault as error:
            faults = [error.fault]
        except sanitize.Unjudged as error:
            wrong.append(f"{name}: {error}")
        for fault in faults:
            if fault.kernel in excused:
                unchecked[fault.kernel] = excused[fault.kernel]
            else:
                wrong.append(f"{name}: {sanitize.message(fault)}")
    for kernel, why in unchecked.items():
        print(f"{op}.{kernel} is not checked by ttsem: {why}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="all", choices=["all", *CASES])
    parser.add_argument("--ttsem", action="store_true", help="under ttsem instead of the interpreter")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.ttsem and not INTERPRETING:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench.races", *sys.argv[1:]]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    wrong = []
    for op in CASES if args.op == "all" else [args.op]:
        wrong += independent(op) if args.ttsem else interpreted(op)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
