"""Files of lines: a torn line is set aside, a failed write changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.studio.records import Records
from mapo_fast.util.errors import UserError


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_short_is_set_aside(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    records = Records(path)
    records.append({"a": 1})
    records.append({"b": "ü"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Records(path)
    assert again.lines == [{"a": 1}]
    again.append({"c": 3})
    assert Records(path).lines == [{"a": 1}, {"c": 3}]
    assert (tmp_path / "lines.jsonl.torn").read_bytes() == whole[9:-cut] + b"\n"


def test_damaged_lines_are_counted_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\nrubbish\n\xff\n[1]\n{"b": 2}\n')
    records = Records(path)
    assert (records.lines, records.damaged) == ([{"a": 1}, {"b": 2}], [2, 3, 4])
    records.append({"c": 3})
    assert path.read_bytes().count(b"\n") == 6


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output")])
@pytest.mark.parametrize("written", [0, 5])
def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, written: int
) -> None:
    path = tmp_path / "lines.jsonl"
    records = Records(path)
    records.append({"a": 1})
    before, real, calls = path.read_bytes(), os.write, []

    def write(handle: int, data: Any) -> int:
        calls.append(1)
        if len(calls) == 1 and written:
            return real(handle, data[:written])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(UserError, match=said):
            records.append({"b": 2})
    assert (path.read_bytes(), records.lines) == (before, [{"a": 1}])
    records.append({"b": 2})
    assert Records(path).lines == [{"a": 1}, {"b": 2}]


def test_a_file_that_was_changed_or_has_gone_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines.jsonl"
    path.parent.mkdir()
    records = Records(path)
    records.append({"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": 2}\n')
    with pytest.raises(UserError, match="was changed by another program"):
        records.append({"c": 3})
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        records.append({"c": 3})
    path.parent.rmdir()
    with pytest.raises(UserError, match="No such file"):
        Records(path).append({"c": 3})
