"""Prompts and labels of any type: the value a person means, or a listed row that shows what was found."""

import datetime
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mapo_fast.data.sources.base import PairRecord, SkippedRow
from mapo_fast.data.sources.cells import clean_prompt, soft_label, wanted
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import shown
from tests.data.pair_sources import pickapic_rows, png, write_jsonl, write_table

NO_LABELS = [
    "yes", "2", "-1", "nan", "inf", "1_0", "0x1", "9" * 500, b"\xff", float("nan"), float("inf"), 10**400, -1,
    Decimal("NaN"), Decimal("sNaN"), Decimal("1e999"), 1j, [1], [], {"a": 1}, (0, 1),
    datetime.date(2024, 1, 1), datetime.timedelta(1), np.datetime64("2024-01-01"), np.timedelta64(1, "ns"),
    np.float32("nan"), np.array([1, 0]), object(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        (True, True), (1, True), (1.0, True), ("1", True), (" 1.0\n", True), ("True", True), (b"true", True),
        (np.int64(1), True), (np.float32(1), True), (np.bool_(True), True), (np.array(1), True),
        (Decimal(1), True), (Fraction(1), True),
        (False, False), (0, False), (-0.0, False), ("0", False), ("false", False), ("FALSE", False),
        (b"0", False), (np.uint8(0), False), (np.bool_(False), False), (np.longdouble(0), False),
        (Decimal("0.0"), False),
    ],
)  # fmt: skip
def test_whether_an_image_is_wanted(label: object, meant: bool) -> None:
    assert wanted(0, "row", label) is meant


@pytest.mark.parametrize(
    ("label", "meant"),
    [(0.25, 0.25), (1, 1.0), ("0.25", 0.25), (b" 0.5 ", 0.5), (Decimal("0.75"), 0.75), (np.float16(0.5), 0.5),
     (True, 1.0), ("false", 0.0)],
)  # fmt: skip
def test_how_probable_a_preference_is(label: object, meant: float) -> None:
    assert soft_label(0, "row", label) == meant


@pytest.mark.parametrize("label", NO_LABELS, ids=lambda label: shown(label)[:20])
def test_what_is_no_label_is_listed_and_shown(label: object) -> None:
    for judged in (wanted(3, "row", label), soft_label(3, "row", label)):
        assert isinstance(judged, SkippedRow)
        assert (judged.index, judged.reason) == (3, "bad label")
        assert judged.detail.startswith("label = ")
        assert len(judged.detail) < 300
        assert "\n" not in judged.detail
        assert "0x" not in judged.detail.replace("'0x1'", ""), "an address differs between runs"


@pytest.mark.parametrize("label", [None, "", " \n", b""])
def test_a_blank_label_is_none(label: object) -> None:
    judged = wanted(0, "row", label)
    assert isinstance(judged, SkippedRow)
    assert judged.reason == "no label"
    assert judged.detail


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        (" a cat\n", "a cat"),
        ("ä cat".encode(), "ä cat"),
        (b"\xef\xbb\xbfcat", "cat"),
        (np.str_("a cat"), "a cat"),
        (None, "missing caption"),
        ("  ", "empty caption"),
        (b"caf\xe9", "bad caption"),
        (5, "bad caption"),
        (float("nan"), "bad caption"),
        (["a", "b"], "bad caption"),
        ({"en": "a"}, "bad caption"),
        ("half \ud83d", "bad caption"),
    ],
)
def test_prompts(prompt: object, meant: str) -> None:
    found = clean_prompt(0, "row", prompt, "caption")
    if isinstance(found, SkippedRow):
        assert found.reason == meant
        assert "caption" in found.detail
    else:
        assert found == meant


def outcomes(source: Path) -> list[Any]:
    """Each row's reason, or its label."""
    pairs = open_source(source)
    return [row.reason if isinstance(row, SkippedRow) else row.label for row in pairs.read(range(len(pairs)))]


LABELS = [
    (
        pa.array(["1", "0.25", "false", "0.5", "x", None, ""]),
        pa.array(["0", "0.75", "true", "0.5", "y", "1", "1"]),
    ),
    (pa.array([b"1", b"\xff"]), pa.array([b"0", b"0"])),
    (pa.array([Decimal("1.00"), Decimal("0.25")]), pa.array([0, 0.75], pa.float32())),
    (pa.array([[1], [0]]), pa.array([[0], [1]])),
    (pa.array([{"a": 1}]), pa.array([{"a": 0}])),
    (pa.array([datetime.date(2024, 1, 1)]), pa.array([0.0])),
    (pa.array([2**62], pa.timestamp("ms")), pa.array([0.0])),
    (pa.array([1], pa.timestamp("ns")), pa.array([1], pa.duration("ns"))),
    (pa.array([float("nan"), float("inf")]), pa.array([0.0, 0.0])),
    (pa.array([True, False]), pa.array([False, True])),
    (pa.array(["1", "0"]).dictionary_encode(), pa.array([0, 1], pa.int8())),
    (pa.nulls(1), pa.nulls(1)),
    (pa.array(np.array([0.3, 0.9], np.float16)), pa.array(np.array([0.7, 0.1], np.float16))),
    (pa.array(["0.333", "0.33"]), pa.array(["0.667", "0.33"])),
]  # fmt: skip
EXPECTED = [
    [1.0, 0.75, 1.0, "tie", "bad label", "no label", "no label"], [1.0, "bad label"], [1.0, 0.75],
    ["bad label"] * 2, ["bad label"], ["bad label"], ["bad label"], ["bad label"], ["bad label"] * 2,
    [1.0, 1.0], [1.0, 1.0], ["no label"], [pytest.approx(0.7, abs=1e-3), pytest.approx(0.9, abs=1e-3)],
    [0.667, "bad label"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "dataset"])
@pytest.mark.parametrize(("labels", "expected"), [*zip(LABELS, EXPECTED, strict=True)])
def test_labels_of_every_type_in_a_table(
    tmp_path: Path, kind: str, labels: tuple[pa.Array, pa.Array], expected: list[Any]
) -> None:
    rows = pickapic_rows(len(expected))
    table = pa.table(
        {key: [row[key] for row in rows] for key in ("jpg_0", "jpg_1", "caption")}
        | {"label_0": labels[0], "label_1": labels[1]}
    )
    write_table(tmp_path / "d", table, kind)
    assert outcomes(tmp_path / "d") == expected


@pytest.mark.parametrize(
    ("has_label", "expected"),
    [
        ("false", "no label"),
        (0, "no label"),
        (b"0", "no label"),
        (None, 1.0),
        ("true", 1.0),
        ("?", "bad label"),
        (2, "bad label"),
        (float("nan"), "bad label"),
    ],
)
def test_has_label_of_any_type(tmp_path: Path, has_label: object, expected: object) -> None:
    table = pa.Table.from_pylist([pickapic_rows(1)[0] | {"has_label": has_label}])
    write_table(tmp_path / "d", table, "parquet")
    assert outcomes(tmp_path / "d") == [expected]


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_prompt_columns_of_other_types(tmp_path: Path, kind: str) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    for number, (column, expected) in enumerate(
        [(pa.array([b"a cat"]), None), (pa.array([7]), "bad caption"), (pa.array([["a"]]), "bad caption"),
         (broken, "bad caption"), (pa.nulls(1), "missing caption")]
    ):  # fmt: skip
        table = pa.table({"prompt": column, "chosen": [png(0)], "rejected": [png(1)]})
        write_table(tmp_path / str(number), table, kind)
        assert outcomes(tmp_path / str(number)) == [expected]


@pytest.mark.parametrize(
    ("line", "reason", "shows"),
    [
        ({"label": [0.5]}, "bad label", "[0.5]"),
        ({"label": {"a": 1}}, "bad label", "{'a': 1}"),
        ({"label": "yes"}, "bad label", "'yes'"),
        ({"label": "0.75"}, "", ""),
        ({"prompt": 5}, "bad caption", "prompt = 5"),
        ({"prompt": ["a"]}, "bad caption", "prompt = ['a']"),
        ({"chosen": 5}, "bad line", "chosen = 5"),
        ({"chosen": None}, "bad line", "chosen = None"),
        ({"chosen": ["w.png"]}, "bad line", "chosen = ['w.png']"),
        ({"chosen": ""}, "missing image", "not a regular file"),
        ({"chosen": "."}, "missing image", "a folder"),
        ("5", "bad line", "an object"),
    ],
)
def test_fields_of_other_types_in_a_line(tmp_path: Path, line: Any, reason: str, shows: str) -> None:
    for name in ("w.png", "l.png"):
        (tmp_path / name).write_bytes(png(1))
    ok = {"prompt": "a", "chosen": "w.png", "rejected": "l.png"}
    write_jsonl(tmp_path, [ok, line if isinstance(line, str) else json.dumps(ok | line)])
    first, second = open_source(tmp_path).read([0, 1])
    assert isinstance(first, PairRecord)
    assert (second.reason if isinstance(second, SkippedRow) else "") == reason
    assert shows in getattr(second, "detail", "")


def test_lines_without_end_and_other_encodings(tmp_path: Path) -> None:
    for name in ("w.png", "l.png"):
        (tmp_path / name).write_bytes(png(1))
    ok = json.dumps({"prompt": "a", "chosen": "w.png", "rejected": "l.png"})
    write_jsonl(
        tmp_path, ["\ufeff" + ok, '{"a": "' + "x" * 3_000_000 + '"}', ok, "[" * 2_000_000, "\ufeff" + ok]
    )
    assert outcomes(tmp_path) == [None, "bad line", None, "bad line", None]
    (tmp_path / "pairs.jsonl").write_text(ok, encoding="utf-16")
    with pytest.raises(Exception, match="is UTF-16: save it as UTF-8"):
        open_source(tmp_path)


@pytest.mark.parametrize("prompt", [None, "", "  ", b"", "a cat"])
def test_a_default_prompt_takes_the_place_of_none(prompt: object) -> None:
    assert clean_prompt(0, "row", prompt, default="a thing") == (prompt if prompt == "a cat" else "a thing")
