"""Time, bandwidth, memory and launches of every op, against PyTorch eager, `torch.compile` and others.

    python -m bench.ops --device cuda             measures what is not yet in bench/results/ops.jsonl
    python -m bench.ops --device cuda --op geglu  one op
    python -m bench.ops --device cpu              tries tiny shapes on the CPU; nothing is written

An op's tests run first, on the same device; while one fails nothing of that op is measured. Rows are written
as they are measured, by GPU and commit, so a run can be stopped and started again. `bench.measure` says how
time is taken. Other libraries are measured where they are installed: `pip install liger-kernel torchao`.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, measure
from bench.cases import CASES, Case, New, cases, differentiable, least_bytes
from bench.dispatch import tensors
from bench.environment import environment

RESULTS = Path(__file__).parent / "results" / "ops.jsonl"
TESTED = Path(__file__).parent / "results" / "gpu_tests.jsonl"
TESTS = Path(__file__).parents[1] / "tests" / "kernels"
PROVIDERS = ("ours", "eager", "liger", "peft", "bitsandbytes", "torchao", "compile")
"""Providers in the order in which they are measured."""
TOO_LARGE = "out of memory"
"""The one error that counts as a result."""


def passes(inputs: Any, call: Callable[[], Any], new: New) -> dict[str, Callable[[], Any]]:
    """The calls to measure: `forward`, `backward` and `both`, or `step`, of one set of inputs."""
    outputs = call()
    if outputs is None:
        return {"step": call}
    wanted, leaves = differentiable(outputs), differentiable(inputs)
    if not wanted:
        return {"forward": call}
    grads = new.like(wanted)
    gradients = functools.partial(torch.autograd.grad, inputs=leaves, grad_outputs=grads)
    return {
        "forward": call,
        "backward": functools.partial(gradients, wanted, retain_graph=True),
        "both": lambda: gradients(differentiable(call())),
    }


def bind(case: Case, provider: str, inputs: Any) -> Callable[[], Any] | None:
    """The provider's call on these inputs, or None where there is no such provider."""
    if provider == "compile":
        return None if case.compiled is None else functools.partial(_compiled(case), *inputs)
    bound = case.providers.get(provider)
    return None if bound is None else bound(*inputs)


@functools.lru_cache(1)
def _compiled(case: Case) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(case.compiled, dynamic=False)


def measured(case: Case, provider: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures of each pass, without what they were measured on."""
    new = New(device, fill=True)
    inputs = case.inputs(new)
    call = bind(case, provider, inputs)
    if call is None:
        return
    least = least_bytes(case, inputs, call())
    least["both"] = sum(least.values())
    sets = [passes(inputs, call, new)]
    on_gpu = device.type == "cuda"
    if on_gpu:
        sets = [measure.on_side_stream(lambda: passes(inputs, call, new))]
        for _ in range(measure.input_sets(min(least.values())) - 1):
            more = case.inputs(new)
            again = bind(case, provider, more)
            assert again is not None
            sets.append(measure.on_side_stream(functools.partial(passes, more, again, new)))
    saved = measure.saved_bytes(call, tensors(inputs)) if "backward" in sets[0] else None
    for name in sets[0]:
        calls = [one[name] for one in sets]
        wall = measure.wall_times(calls[:5])
        row: dict[str, Any] = {
            "pass": name,
            "wall_ms": wall,
            "floor_bytes": least[name],
            "saved_bytes": saved,
        }
        if on_gpu:
            try:
                times, row["timed"] = measure.device_times(calls), "graph"
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                times, row["timed"] = measure.event_times(calls), "events"
            row |= {
                "device_ms": times,
                "gbps": least[name] / times.p50 / 1e6,
                "peak_bytes": measure.peak_bytes(calls[0]),
                "launches": measure.launches(calls[0]),
            }
        yield row


def ordered(selected: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Measurements, most important first; those with `torch.compile` last, because compiling takes long."""
    for headline in (True, False):
        chosen = [case for case in selected if case.headline == headline]
        for slow in (False, True):
            for case in chosen:
                for provider in PROVIDERS:
                    if (provider == "compile") == slow and (provider in case.providers or slow):
                        yield case, provider


def passed(
    file: Path, device: str, stamp: dict[str, Any], *, deadline: float, results: Path = TESTED
) -> bool:
    """Whether a file's tests pass on the device before the deadline; run once for a GPU and a commit."""
    name = file.name
    if device == "cuda":
        for row in _rows(results):
            if row["file"] == name and row["passed"] and _same(row["environment"], stamp):
                return True
    marker = "gpu" if device == "cuda" else "not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", str(file)]
    started = time.monotonic()
    seconds = None if deadline == float("inf") else max(1.0, deadline - started)
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: the time is up; run again to go on", file=sys.stderr)
        return False
    ok = result.returncode == 0
    summary = (result.stdout.splitlines() or ["no output"])[-1]
    print(f"{name}: {summary}", file=sys.stderr, flush=True)
    if not ok:
        print(result.stdout[-4000:], file=sys.stderr)
    if device == "cuda":
        row = {
            "file": name,
            "passed": ok,
            "summary": summary,
            "seconds": round(time.monotonic() - started, 1),
        }
        _append(results, row | {"environment": stamp})
    return ok


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["gpu"], a["commit"]) == (b["gpu"], b["commit"])


def run(
    op: str,
    device: str,
    *,
    tested: bool,
    deadline: float,
    failed_files: Collection[str] = (),
    results: Path = RESULTS,
) -> int:
    """Measure missing cases; returns the number of ops whose tests fail and of providers that fail or failed.

    Args:
        tested: the ops' tests have just passed, but for those in `failed_files`, which are not run again.
    """
    stamp = environment()
    target = torch.device(device)
    mine = [row for row in _rows(results) if _same(row["environment"], stamp)]
    done = {(row["op"], row["shape"], row["dtype"], row["provider"]) for row in mine}
    selected = cases(op, "measure" if device == "cuda" else "try")
    todo = [
        (case, name)
        for case, name in ordered(selected)
        if (*case.key, name) not in done and (device == "cuda" or name != "compile")
    ]
    green = {
        name: f"test_{name}.py" not in failed_files
        and (tested or passed(TESTS / f"test_{name}.py", device, stamp, deadline=deadline))
        for name in dict.fromkeys(case.op for case, _ in todo)
    }
    copy = measure.copy_gbps(target) if device == "cuda" else None
    failed = sum(row.get("error", TOO_LARGE) != TOO_LARGE for row in mine if op in ("all", row["op"]))
    for i, (case, provider) in enumerate(todo):
        if not green[case.op]:
            continue
        if time.monotonic() > deadline:
            print(f"Time is up: {len(todo) - i} of {len(todo)} left. Run again to go on.", file=sys.stderr)
            break
        op_name, shape, dtype = case.key
        row = {"op": op_name, "shape": shape, "dtype": dtype, "provider": provider, "headline": case.headline}
        try:
            for figures in measured(case, provider, target):
                found = row | figures
                if copy is not None:
                    found |= {"copy_gbps": copy, "share_of_copy": found["gbps"] / copy}
                    _append(results, found | {"environment": stamp})
                print(_line(found), flush=True)
        except Exception as error:  # of many kinds; a GPU that it has made unusable ends this run only
            reason = TOO_LARGE
            if not isinstance(error, torch.OutOfMemoryError):
                failed += 1
                traceback.print_exc()
                reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            broken = row | {"pass": "-", "error": reason}
            print(_line(broken), flush=True)
            if device == "cuda":
                _append(results, broken | {"environment": stamp})
        if device == "cuda":
            torch.cuda.empty_cache()
    return failed + sum(not ok for ok in green.values())


def _line(row: dict[str, Any]) -> str:
    what = f"{row['op']:20} {row['shape'] + ' ' + row['dtype']:50} {row['provider']:12} {row['pass']:9}"
    if "error" in row:
        return f"{what} {row['error']}"
    parts = [f"wall {row['wall_ms'].p50:9.3f} ms"]
    if "device_ms" in row:
        share = f"{100 * row['share_of_copy']:.0f} % of copy"
        parts += [f"device {row['device_ms'].p50:9.4f} ms", f"{row['gbps']:7.0f} GB/s", share]
    if row["saved_bytes"] is not None:
        parts.append(f"saved {row['saved_bytes'] / 2**20:.2f} MiB")
    return f"{what} {', '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", default="all", choices=["all", *CASES])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tested", action="store_true", help="the ops' tests have just passed here")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.ops: there is no NVIDIA GPU here; --device cpu tries tiny shapes", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    return 1 if run(args.op, args.device, tested=args.tested, deadline=deadline) else 0


if __name__ == "__main__":
    raise SystemExit(main())
