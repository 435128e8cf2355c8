"""The pair table: read record by record."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mapo_fast.data import table as table_module
from mapo_fast.data.table import PAIR, PairRows, PairTable, table_digests
from mapo_fast.engine.batches import MicroBatches
from mapo_fast.util.errors import UserError
from tests.data.preparing import flip_byte


@pytest.mark.slow
def test_ten_million_pairs_start_at_once_and_take_no_memory(tmp_path: Path) -> None:
    table = np.lib.format.open_memmap(tmp_path / "pairs.npy", "w+", PAIR, (10**7,))  # sparse on disk
    table["bucket"][4 * 10**6 :] = 64
    tracemalloc.start()
    begin = time.process_time()
    rows = PairRows(PairTable(tmp_path / "pairs.npy", ()), 5, 10**7)
    batches = MicroBatches(rows, 4, seed=0)
    found = [batches.at(position)[1] for position in (0, 10**6, 3 * 10**6)]
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches.per_epoch == -(-(4 * 10**6 - 5) // 4) + 6 * 10**6 // 4
    assert all(len(pairs) == 4 for pairs in found)
    assert rows[-1].index == 10**7 - 1
    assert seconds < 2
    assert peak < 10**6


def test_a_large_table_is_checked_piece_by_piece(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.load(copy / "pairs.npy")
    monkeypatch.setattr(table_module, "PIECE", 4)
    digests = table_digests(table)
    path = copy / "pairs.npy"
    flip_byte(path)  # in the last piece
    checked = PairTable(path, digests)
    assert checked[3].tobytes() == table[3].tobytes()
    for _ in range(2):
        with pytest.raises(UserError, match=r"pairs\.npy is damaged"):
            checked[11]
    assert checked[7].tobytes() == table[7].tobytes()
