"""Many pictures and votes, at a fiftieth of the size that the committed row has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studio import RESULTS, measure


@pytest.mark.slow
def test_headers_and_the_next_pair_are_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    row = measure(tmp_path / "project", 400, 200)
    assert row["headers_per_cpu_s"] >= 500
    assert row["next_pair_ms"]["p95"] < 100


def test_the_committed_row_keeps_the_promises() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    row = [row for row in rows if row["what"] == "pictures and votes"][-1]
    assert (row["pictures"], row["votes"]) == (20_000, 10_000)
    assert row["headers_per_cpu_s"] >= 500
    assert row["next_pair_ms"]["p95"] < 100
    first, last = row["memory_mib"]
    assert last - first < 20


def test_pairs_are_drawn_at_random_as_no_rule_was_better() -> None:
    """At equal votes, over three seeds, with a fifth of the votes wrong."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    shares = {
        rule: {
            row["seed"]: row["preferred_share"]["after"]
            for row in rows
            if row["what"] == "votes" and (row["rule"], row["votes"], row["wrong"]) == (rule, 120, 0.2)
        }
        for rule in ("random", "fewest")
    }
    assert [*map(len, shares.values())] == [3, 3]
    assert sum(shares["fewest"].values()) <= sum(shares["random"].values())
