"""Compile every kernel launch ahead of time, without a GPU; prints one JSON line per compilation.

A program of its own: Triton's interpreter and compiler cannot share a process, and the run must not inherit
TRITON_INTERPRET. The launchers really run, on CPU tensors, with a recorder in the kernel's place, so that
what is compiled is what production launches: the same specialisations (1, multiples of 16, None) and blocks.

    python tests/kernels/aot.py 75 80 90
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mapo_kernels import _pair_kernels as op
from mapo_kernels import paired_noise
from mapo_kernels._pair_layout import Halves, Operands, Target, mask_halves, merge_layout, split_halves
from mapo_kernels.objectives import OBJECTIVES

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands where a kernel stands and keeps what it was launched with."""

    def __init__(self) -> None:
        self.launch: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.launch = (args, kwargs)


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    options = {name: kwargs.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp64"
            aligned = False
        elif name.isupper() or value is None or value == 1:
            signature[name] = "constexpr"
            constants[(position,)] = value
            aligned = False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cache hit would skip ptxas and its log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = log.getvalue()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[248]\.", ptx)),
        "ptx": ptx,
    }


def launches() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (case, kernel, args, kwargs) of the launches to compile."""

    def case(
        name: str,
        prediction: Tensor,
        target: Tensor | None,
        objective: str,
        kind: str = "stored",
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        reference: Tensor | None = None,
        per_pair: bool = False,
    ) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
        p = split_halves(prediction, None)
        pairs = len(p.chosen)
        known = OBJECTIVES[objective]
        operands = Operands(
            p,
            Target(
                kind,
                None if target is None else split_halves(target, None),
                None if kind == "stored" else torch.zeros(pairs, dtype=torch.int64),
                torch.ones(pairs) if kind == "v" else None,
                torch.ones(pairs) if kind == "v" else None,
            ),
            mask_halves(mask, p.chosen),
            None if reference is None else split_halves(reference, None),
        )
        given = (torch.ones(pairs), torch.ones(pairs)) if known.reference and reference is None else None
        labels = None if known.labels == "refused" else torch.ones(pairs)
        baseline = torch.zeros(()) if known.baseline else None
        settings = [s.default for s in known.settings.values()] + [0.0] * 3
        scalars = op.PairScalars(weights, labels, given, baseline, objective, settings[:3], per_pair)
        forward, backward = Recorder(), Recorder()
        with (
            mock.patch.object(op, "_forward_kernel", forward),
            mock.patch.object(op, "_backward_kernel", backward),
        ):
            layout = operands.layout()
            assert layout is not None, name
            terms = op.launch_forward(operands, scalars, layout)
            grad = p if prediction.numel() > 2**31 else split_halves(torch.empty_like(prediction), None)
            layout = operands.layout(grad)
            assert layout is not None, name
            op.launch_backward(terms.loss, terms.coefficients, operands, grad, layout)
        assert forward.launch is not None
        assert backward.launch is not None
        yield f"{name} forward", op._forward_kernel, *forward.launch
        yield f"{name} backward", op._backward_kernel, *backward.launch

    bf16 = torch.zeros(8, 4, 128, 128, dtype=torch.bfloat16)
    yield from case("SDXL bf16, fp32 target", bf16, bf16.float(), "mapo_code")
    yield from case(
        "fp32 strided, bool mask, weights",
        torch.zeros(6, 5, 9, 14)[..., ::2],
        torch.zeros(6, 5, 9, 7).to(memory_format=torch.channels_last),
        "mapo_paper_power",
        mask=torch.ones(3, 1, 9, 7, dtype=torch.bool),
        weights=torch.ones(3),
        per_pair=True,
    )
    five = torch.zeros(4, 3, 6, 5, 8)
    yield from case(
        "fp16, four walked dimensions",
        five.half(),
        five.permute(0, 2, 1, 4, 3).contiguous().permute(0, 2, 1, 4, 3),
        "mapo_paper_scale",
    )
    yield from case("one element", torch.zeros(2, 1), torch.zeros(2, 1), "sft")
    yield from case("fp64", bf16.double(), bf16, "mapo_paper_power")
    huge = torch.zeros(1, dtype=torch.bfloat16).expand(4, 2**31)
    yield from case("2^31 elements a sample", huge, huge, "mapo_code")
    for objective in ("smpo", "ipo", "hinge", "dmpo", "linear_dpo", "orpo", "simpo", "cpo"):
        forward, _ = case(objective, bf16, bf16, objective)  # the others' epilogues are in the other cases
        yield forward
    yield from case("reference prediction", bf16, bf16.float(), "kto", reference=bf16)
    yield from case("epsilon target, reference", bf16, None, "dpo", "epsilon", reference=bf16)
    yield from case("v target", bf16, bf16, "mapo_code", "v")
    last = bf16.to(memory_format=torch.channels_last)
    yield from case("flow target, channels_last", last, bf16, "mapo_code", "flow")
    yield from case("2^31 elements a sample, epsilon", huge, None, "mapo_code", "epsilon")

    noise = sys.modules[paired_noise.__module__]
    for name, latents in (("bf16", bf16[:4]), ("channels_last", last[:4]), ("2^31", huge[:2])):
        noisy = Halves(latents, latents)
        layout = merge_layout(noisy, noisy, logical=True)
        ones = torch.ones(len(latents))
        with mock.patch.object(noise, "_noise_kernel", Recorder()) as recorder:
            noise._launch(noisy, ones.long(), ones, ones, noisy, layout)
        assert recorder.launch is not None
        yield f"noise {name}", noise._noise_kernel, *recorder.launch


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]]
    for i, (name, kernel, args, kwargs) in enumerate(launches()):
        # The first two cases take every path; for the others the oldest and the newest card will do.
        for capability in capabilities if i < 4 else (capabilities[0], capabilities[-1]):
            result = compile_launch(kernel, args, dict(kwargs), capability)
            print(json.dumps({"case": name, "capability": capability, **result}))


if __name__ == "__main__":
    main()
