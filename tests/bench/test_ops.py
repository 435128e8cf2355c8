"""The microbenchmarks' machinery on the CPU: what is measured, in which order, when not, and the tables."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_step, op_tables, ops, plot
from bench.cases import CASES, New, cases, differentiable, least_bytes, tensors
from bench.dispatch import Untouched

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_tiny_cases_run_with_every_provider(op: str) -> None:
    """Ours and eager always; other libraries where they are installed."""
    found = [
        (provider, row)
        for case in cases(op, "try")
        for provider in case.providers
        for row in ops.measured(case, provider, CPU)
    ]
    assert {"ours", "eager"} <= {provider for provider, _ in found}
    for _, row in found:
        assert row["pass"] in ("forward", "backward", "both", "step")
        assert 0 < row["wall_ms"].p20 <= row["wall_ms"].p50 <= row["wall_ms"].p80
        assert row["floor_bytes"] > 0
        assert "device_ms" not in row


@pytest.mark.parametrize("op", CASES)
def test_ours_and_eager_agree(op: str) -> None:
    """They must compute the same thing, or comparing their times means nothing."""
    for case in cases(op, "try"):
        if op in ("paired_noise", "adamw8bit") or "keys" in case.shape:
            continue  # random: each draws its own
        results = []
        for provider in ("ours", "eager"):
            torch.manual_seed(0)
            inputs = case.inputs(New(CPU, fill=True))
            results.append([x.detach().float() for x in tensors(case.providers[provider](*inputs)())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_every_op_has_cases_of_each_kind() -> None:
    for op in CASES:
        uses = [case.uses for case in cases(op)]
        for use in ("compile", "count", "measure", "try"):
            assert any(use in found for found in uses), (op, use)
        assert any(case.headline for case in cases(op)), op
        keys = [case.key for case in cases(op)]
        assert len(keys) == len(set(keys)), op


def test_floor_counts_inputs_outputs_and_gradients_once() -> None:
    case = next(case for case in cases("geglu") if case.shape == "4×4096×5120")
    new = New(CPU)
    with Untouched():
        inputs = case.inputs(new)
        outputs = case.providers["eager"](*inputs)()
    elements = 4 * 4096 * 2560
    assert least_bytes(case, inputs, outputs) == {"forward": 2 * 3 * elements, "backward": 2 * 5 * elements}
    assert len(differentiable(inputs)) == 1


def test_headlines_come_first_and_compiled_code_last() -> None:
    order = list(ops.ordered(cases(use="measure")))
    headline = [case.headline for case, _ in order]
    assert headline == sorted(headline, reverse=True)
    first = [provider for case, provider in order if case.headline]
    assert first.index("compile") > max(i for i, name in enumerate(first) if name != "compile")


def test_rows_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = {"gpu": None, "commit": "abc"}
    monkeypatch.setattr(ops, "environment", lambda: stamp)
    (case,) = cases("geglu", "try")
    op, shape, dtype = case.key
    rows = [
        {
            "op": op,
            "shape": shape,
            "dtype": dtype,
            "provider": name,
            "environment": stamp | {"commit": commit},
        }
        for name, commit in (("ours", "abc"), ("eager", "older"))
    ]
    results = tmp_path / "ops.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ops.run("geglu", "cpu", tested=True, deadline=float("inf"), results=results) == 0
    out = capsys.readouterr().out
    assert " eager " in out
    assert " ours " not in out
    assert len(results.read_text().splitlines()) == 2  # nothing from a CPU is written


@pytest.mark.slow
def test_a_provider_that_fails_costs_nobody_else_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = ops.measured

    def measured(case: Any, provider: str, device: torch.device) -> Any:
        if provider == "ours":
            raise TypeError("another version\ntakes other arguments")
        return real(case, provider, device)

    monkeypatch.setattr(ops, "measured", measured)
    assert ops.run("geglu", "cpu", tested=True, deadline=float("inf"), results=tmp_path / "o.jsonl") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].endswith(" ours         -         another version")
    assert " eager " in captured.out
    assert "takes other arguments" in captured.err


@pytest.mark.parametrize(("error", "failed"), [("out of memory", 0), ("another version", 1)])
def test_what_failed_before_a_run_went_on_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, failed: int
) -> None:
    stamp = {"gpu": "H100", "commit": "abc"}
    for module in (ops, gpu_step):
        monkeypatch.setattr(module, "environment", lambda: stamp)
    row: dict[str, Any] = {"error": error, "environment": stamp}
    step = row | {"provider": "released", "kind": "full", "pairs": 4, "checkpointing": False}
    monkeypatch.setattr(gpu_step, "rows", lambda: [step])
    monkeypatch.setattr(gpu_step, "cases", lambda: [gpu_step.Case("released", "full", 4, False)])
    assert gpu_step.run(float("inf")) == failed
    (case,) = cases("geglu", "try")
    names = zip(("op", "shape", "dtype", "provider"), (*case.key, "ours"), strict=True)
    (tmp_path / "o.jsonl").write_text(json.dumps(row | dict(names)) + "\n")
    far = float("inf")
    assert ops.run("geglu", "cpu", tested=True, deadline=far, results=tmp_path / "o.jsonl") == failed


def test_files_with_gpu_tests_are_found() -> None:
    found = {
        path.name
        for folder in (ops.TESTS, ops.TESTS.parent / "engine")
        for path in folder.glob("test_*.py")
        if gpu_check.HAS_GPU_TESTS.search(path.read_text("utf-8"))
    }
    assert {"test_geglu.py", "test_patched_unet.py", "test_cuda.py", "test_graphs.py"} <= found
    assert "test_shim.py" not in found, "pytest fails where it collects nothing"


@pytest.mark.slow
def test_gpu_tests_run_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text("@pytest.mark.gpu\n")
    (tmp_path / "test_e.py").write_text("")
    both = threading.Barrier(2, timeout=60)

    def passed(file: Path, device: str, stamp: Any, *, deadline: float) -> bool:
        both.wait()
        return file.name != "test_b.py"

    monkeypatch.setattr(ops, "passed", passed)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    memory = SimpleNamespace(total_memory=24 * 2**30)  # for two at a time
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert gpu_check._failed(tmp_path, deadline=float("inf")) == ["test_b.py"]
    assert capsys.readouterr().err == "Not passed: test_b.py\n"


@pytest.mark.slow
def test_time_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops.run("geglu", "cpu", tested=True, deadline=time.monotonic(), results=tmp_path / "none.jsonl")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "left. Run again to go on" in captured.err


@pytest.mark.slow
def test_nothing_is_measured_while_a_test_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "test_geglu.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(ops, "TESTS", tmp_path)
    assert ops.run("geglu", "cpu", tested=False, deadline=float("inf"), results=tmp_path / "o.jsonl") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 failed" in captured.err
    far = float("inf")
    known = {"deadline": far, "failed_files": ["test_geglu.py"], "results": tmp_path / "o.jsonl"}
    assert ops.run("geglu", "cpu", tested=True, **known) == 1  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.slow
def test_a_passed_file_is_not_run_again_on_the_same_gpu_and_commit(tmp_path: Path) -> None:
    test = tmp_path / "test_x.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_x():\n    pass\n")
    results = tmp_path / "tests.jsonl"
    stamp = {"gpu": "a card", "commit": "abc"}
    far = float("inf")
    assert ops.passed(test, "cuda", stamp, deadline=far, results=results)
    test.write_text("raise SystemExit(1)\n")
    assert ops.passed(test, "cuda", stamp, deadline=far, results=results)
    assert not ops.passed(test, "cuda", stamp | {"commit": "def"}, deadline=far, results=results)
    assert [json.loads(line)["passed"] for line in results.read_text().splitlines()] == [True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
@pytest.mark.parametrize(
    ("part", "code", "message"),
    [
        ("ops", 2, "no NVIDIA GPU"),
        ("memory", 2, "no NVIDIA GPU"),
        ("step", 2, "no NVIDIA GPU"),
    ],
)
def test_gpu_check_says_why_it_cannot(
    part: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", part])
    assert gpu_check.main() == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# --- Tables and plots ---


def measured_row(provider: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "op": "geglu",
        "shape": "4×4096×5120",
        "dtype": "bf16",
        "pass": "forward",
        "provider": provider,
        "headline": True,
        "device_ms": [0.9 * milliseconds, milliseconds, 1.1 * milliseconds],
        "gbps": 900.0 / milliseconds,
        "share_of_copy": 0.9 / milliseconds,
        "environment": {"gpu": "Test Card 1", "commit": "abc"},
    } | changes


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    assert op_tables.table([]) == "not measured yet"
    assert op_tables.table([{"op": "geglu", "wall_ms": [1, 2, 3]}]) == "not measured yet"
    assert plot.plot([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tables_compare_with_the_newest_row_of_each_provider(tmp_path: Path) -> None:
    measured = [
        measured_row("ours", 7.0),
        measured_row("ours", 1.0),
        measured_row("eager", 2.5),
        measured_row("compile", 1.25),
        measured_row("liger", 1.5),
        measured_row("ours", 3.0, shape="a sweep", headline=False),
    ]
    lines = op_tables.table(measured).splitlines()
    assert lines[0] == "Test Card 1:"
    assert lines[-1] == (
        "| `geglu` | 4×4096×5120 bf16 | forward | 1.0000 (0.9000, 1.1000) | 900 | 90 % | 2.50 × | 1.25 × "
        "| liger 1.50 × |"
    )
    assert "a sweep" in op_tables.table(measured, headlines=False)
    (path,) = plot.plot(measured, tmp_path)
    assert path.name == "ops_Test_Card_1.png"
    assert path.stat().st_size > 0


def test_the_command_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["ops", "--device", "cuda"])
    assert ops.main() == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
