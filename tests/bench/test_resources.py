"""Every kernel compiles for every card, fits its shared memory and spills nothing; and none got worse."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

from bench import resources
from bench.cases import cases

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return resources.committed()


def test_the_table_is_good(table: list[dict[str, Any]]) -> None:
    kernels = {(row["kernel"], row["cc"]) for row in table}
    assert {cc for _, cc in kernels} == set(resources.CARDS)
    assert len(kernels) == len({name for name, _ in kernels}) * len(resources.CARDS)
    for row in table:
        assert row["ok"], row
        assert row["shared_bytes"] <= resources.SHARED_MEMORY[row["cc"]], row
        assert row["spill_bytes"] == 0 or row["cc"] < 80, row


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table_is_of_these_kernels_and_none_is_worse() -> None:
    """Compiles one configuration of each kernel; of the others it compares the digests."""
    command = [sys.executable, "-m", "bench.resources", "--check", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def row(**changes: Any) -> dict[str, Any]:
    fresh = {"kernel": "k", "config": "c", "cc": 80, "registers": 100, "spill_bytes": 0, "ok": True}
    return fresh | changes


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"registers": 110}, None),
        ({"registers": 111}, "registers 100 -> 111"),
        ({"spill_bytes": 4}, "spills 0 -> 4 bytes"),
        ({"ok": False}, "not ok"),
        ({"config": "new", "registers": 200}, None),
    ],
)
def test_worse_is_noticed(now: dict[str, Any], message: str | None) -> None:
    found = resources.worse([row()], [row(**now)])
    assert bool(found) == (message is not None)
    assert message is None or message in found[0]


@pytest.fixture(scope="module")
def loss_on_every_card() -> list[tuple[resources.Job, str]]:
    """The loss's kernels on bf16 latents with an fp32 target, and their PTX."""
    chosen = [case for case in cases("paired_loss") if "fp32 target" in case.shape]
    jobs = resources.launches(chosen)
    assert len(jobs) == 2 * len(resources.CARDS)
    return [(job, resources.compile_job(job)[1]) for job in jobs]


@pytest.mark.slow
def test_changes_are_noticed(loss_on_every_card: list[tuple[resources.Job, str]]) -> None:
    jobs = [job for job, _ in loss_on_every_card]
    rows = [job.row for job in jobs]
    assert resources.outdated(rows, jobs) == []
    assert "not in the table" in resources.outdated(rows[1:], jobs)[0]
    assert "no longer launched" in resources.outdated(rows, jobs[1:])[0]


@pytest.mark.slow
def test_dense_latents_move_in_16_byte_accesses(loss_on_every_card: list[tuple[resources.Job, str]]) -> None:
    for job, ptx in loss_on_every_card:
        data = re.findall(r"(?:ld|st)\.global\.v4\.b32", ptx)
        assert len(data) >= 3, job.config  # bf16 prediction, and two halves of the fp32 target


@pytest.mark.slow
def test_partial_sums_are_published_in_order(loss_on_every_card: list[tuple[resources.Job, str]]) -> None:
    """Store, barrier, acquire-release addition, barrier, reads past L1: what the last program relies on."""
    forwards = [ptx for job, ptx in loss_on_every_card if "forward" in job.name]
    assert len(forwards) == len(resources.CARDS)
    order = r"st\.global.*?bar\.sync.*?atom\.global\.gpu\.acq_rel\.add\.u32.*?bar\.sync.*?ld\.global\.cg"
    for ptx in forwards:
        assert re.search(order, ptx, re.DOTALL)
        assert len(re.findall(r"\b(?:atom|red)\.", ptx)) == 1  # and no atomics on floats
        assert not re.search(r"ld\.global\.cg.*atom\.", ptx, re.DOTALL)
