"""Folders with `pairs.jsonl`."""

from pathlib import Path
from typing import Any

import pytest

from mapo_fast.data.sources.registry import open_source
from tests.data.pair_sources import png, write_jsonl
from tests.data.sources.reading import good, read, reasons


def test_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "images" / f"{name}.png").write_bytes(png(ord(name)))
    (tmp_path / "secret.png").write_bytes(png(9))
    ok = {"prompt": " ä cat ", "chosen": "images/a.png", "rejected": "images/b.png"}
    write_jsonl(
        folder,
        [
            ok,
            "",
            "{broken",
            [1, 2],
            {"prompt": "x", "chosen": "images/a.png"},
            ok | {"prompt": ""},
            {k: v for k, v in ok.items() if k != "prompt"},
            ok | {"rejected": "images/c.png"},
            ok | {"rejected": "../secret.png"},
            ok | {"rejected": str(tmp_path / "secret.png")},
            ok | {"rejected": str(folder / "images" / "a.png")},
            ok | {"rejected": "images/../images/b.png"},
        ],
    )
    rows = read(folder)
    assert good(rows[0]) == ("ä cat", png(ord("a")), png(ord("b")))
    assert rows[1].name == "pairs.jsonl:3"
    assert reasons(folder) == [
        "", "bad line", "bad line", "bad line", "empty caption", "missing caption", "missing image",
        "path outside the folder", "path outside the folder", "path outside the folder", "",
    ]  # fmt: skip
    assert [r.index for r in read(folder / "pairs.jsonl")] == [r.index for r in rows], (
        "the file's own name works"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "half a \ud83d smile"}, "bad caption"),
        ({"chosen": "a\0b.png"}, "missing image"),
        ({"chosen": "x" * 300 + ".png"}, "missing image"),
        ({"rejected": "\ud800.png"}, "missing image"),
        ("[" * 100_000, "bad line"),
        ("9" * 5000, "bad line"),
    ],
    ids=["surrogate in prompt", "NUL", "long name", "surrogate in path", "nested", "long number"],
)
def test_one_bad_line_is_one_skipped_row(tmp_path: Path, line: Any, reason: str) -> None:
    for name in ("w.png", "l.png"):
        (tmp_path / name).write_bytes(png(1))
    ok = {"prompt": "a", "chosen": "w.png", "rejected": "l.png"}
    write_jsonl(tmp_path, [ok, line if isinstance(line, str) else ok | line, ok])
    assert reasons(tmp_path) == ["", reason, ""]
    open_source(tmp_path).identity()


def test_a_table_beside_twin_folders_wins_and_says_so(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "1.png").write_bytes(png(1))
    assert not open_source(tmp_path).note
    write_jsonl(tmp_path, ["{}", "{}"])
    pairs = open_source(tmp_path)
    assert len(pairs) == 2
    assert "pairs.jsonl and the folders chosen/ + rejected/: pairs.jsonl is used" in pairs.note
