"""The folder that the user names decides: its links are followed, and what cannot be read is named."""

import os
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mapo_fast.data.sources import listing
from mapo_fast.data.sources.base import MissingImageError, PairRecord, SkippedRow
from mapo_fast.data.sources.listing import Folder, list_files
from mapo_fast.data.sources.registry import open_source
from mapo_fast.util.errors import MachineError, UserError
from tests.data.pair_sources import pickapic_rows, png, snapshot, write_jsonl, write_parquet, write_table

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


def outcomes(source: Path) -> dict[str, Any]:
    """Each row's chosen image, or reason and detail."""
    pairs = open_source(source)
    found: dict[str, Any] = {}
    for row in pairs.read(range(len(pairs))):
        if isinstance(row, SkippedRow):
            found[row.name] = row.reason, row.detail
            continue
        try:
            found[row.name] = row.chosen()  # type: ignore[misc]
        except MissingImageError as error:
            found[row.name] = error.reason, str(error)
    pairs.identity()
    return found


def twins(folder: Path, count: int = 2) -> Path:
    for side, name in enumerate(("chosen", "rejected")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(png(2 * i + side))
            (folder / name / f"{i}.txt").write_text(f"thing {i}")
    return folder


def lines(folder: Path) -> Path:
    twins(folder, 2)
    write_jsonl(
        folder, [{"prompt": "a", "chosen": f"chosen/{i}.png", "rejected": f"rejected/{i}.png"} for i in "01"]
    )
    return folder


def parquet(folder: Path) -> Path:
    write_parquet(
        folder / "data" / "train-00000-of-00001.parquet", pickapic_rows(2, label_0=1.0, label_1=0.0)
    )
    return folder


def saved(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(pickapic_rows(2, label_0=1.0, label_1=0.0)).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("make", [twins, lines, parquet, saved])
def test_a_snapshot_of_the_hub(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = snapshot(make(tmp_path / "hub" / "snapshots"))
    assert list(outcomes(source).values()) == [png(0), png(2)]


def test_linked_folders_are_seen(tmp_path: Path) -> None:
    twins(tmp_path / "elsewhere", 1)
    source = twins(tmp_path / "source", 1)
    for name in ("chosen", "rejected"):
        (source / name / "more").symlink_to(tmp_path / "elsewhere" / name, target_is_directory=True)
    assert list(outcomes(source)) == ["chosen/0", "chosen/more/0"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "data").symlink_to(parquet(tmp_path / "more"), target_is_directory=True)
    assert len(outcomes(tmp_path / "tables")) == 2
    linked = tmp_path / "linked"
    linked.symlink_to(source, target_is_directory=True)
    assert len(outcomes(linked)) == 2


def test_what_links_lead_to_decides_about_identity(tmp_path: Path) -> None:
    source = snapshot(twins(tmp_path / "hub" / "s"))
    before = open_source(source).identity()
    assert open_source(source).identity() == before
    blob = (source / "chosen" / "0.png").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    assert open_source(source).identity() != before


def test_an_image_that_was_missing_changes_the_source_when_it_comes(tmp_path: Path) -> None:
    source = lines(tmp_path / "s")
    (source / "chosen" / "1.png").unlink()
    before = open_source(source).identity()
    (source / "chosen" / "1.png").write_bytes(png(3))
    assert open_source(source).identity() != before


def test_cycles_and_dangling_links_are_named(tmp_path: Path) -> None:
    source = twins(tmp_path / "s")
    (source / "chosen" / "loop").symlink_to(source, target_is_directory=True)
    (source / "chosen" / "gone").symlink_to(tmp_path / "nowhere")
    (source / "chosen" / "self").symlink_to("self")
    pairs = open_source(source)
    assert len(pairs) == 2
    for name in ("chosen/loop: it leads back", "chosen/gone: No such file", "chosen/self: Too many levels"):
        assert name in pairs.note
    assert "\n" not in pairs.note
    (source / "chosen" / "1.png").unlink()
    (source / "chosen" / "1.png").symlink_to(tmp_path / "nowhere.png")
    (source / "rejected" / "0.png").unlink()
    (source / "rejected" / "0.png").symlink_to("0.png")
    found = outcomes(source)
    assert found["chosen/1"] == ("missing image", f"No such file or directory ({tmp_path / 'nowhere.png'})")


def test_a_table_that_links_to_nothing_is_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path / "s")
    (source / "data" / "train-00001-of-00001.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train-00001-of-00001\.parquet: No such file or directory"):
        open_source(source)
    (tmp_path / "pairs.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read: No such file .*pairs\.jsonl"):
        open_source(tmp_path)


def test_folders_linked_over_and_over_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LINKED_FOLDERS", 50)
    twins(tmp_path / "s")
    for level in range(20):  # 2^20 ways to the last one
        folder = tmp_path / "levels" / str(level)
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / name).symlink_to(tmp_path / "levels" / str(level + 1), target_is_directory=True)
    (tmp_path / "s" / "chosen" / "levels").symlink_to(tmp_path / "levels" / "0", target_is_directory=True)
    with pytest.raises(UserError, match="more than 50 links to folders"):
        open_source(tmp_path / "s")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fifo, "a FIFO"),
        (endless, "a device"),
        (listening, ""),
        (huge, "larger than the limit"),
        (Path.mkdir, ""),
    ],
)
@pytest.mark.parametrize("layout", [twins, lines])
def test_what_is_no_regular_file_is_a_skipped_row(
    tmp_path: Path, layout: Callable[[Path], Path], make: Callable[[Path], None], says: str
) -> None:
    source = layout(tmp_path / "s")
    (source / "chosen" / "1.png").unlink()
    make(source / "chosen" / "1.png")
    found = list(outcomes(source).values())
    assert found[0] == png(0)
    assert found[1][0] == (
        "missing counterpart" if make is Path.mkdir and layout is twins else "missing image"
    )
    assert says in found[1][1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [fifo, endless, listening])
@pytest.mark.parametrize(
    "name", ["pairs.jsonl", "a.parquet", "a.arrow", "state.json", "dataset_dict.json", "chosen/0.txt", ""]
)
def test_special_files_in_the_place_of_tables_and_captions(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    source = tmp_path / "s"
    if name == "chosen/0.txt":
        twins(source)
        (source / name).unlink()
        make(source / name)
        assert outcomes(source)["chosen/0"][0] == "unreadable caption"
        return
    if name:
        source.mkdir()
    make(source / name if name else source)
    with pytest.raises(UserError) as error:
        open_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("column", ["path", "struct", "category", "struct of categories"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_paths_in_a_table_stay_inside_the_folder(tmp_path: Path, column: str, kind: str) -> None:
    folder = tmp_path / "s"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(png(0))
    (tmp_path / "private.png").write_bytes(png(9))
    (folder / "linked.png").symlink_to(tmp_path / "private.png")
    fifo(folder / "fifo.png")
    outside = "path outside the folder"
    paths = {
        "images/a.png": png(0),
        "linked.png": png(9),
        "../private.png": outside,
        str(tmp_path / "private.png"): outside,
        "images/../../private.png": outside,
        "/dev/zero": outside,
        "fifo.png": "missing image",
        "a\0b.png": "missing image",
        "no.png": "missing image",
        "~nouser/a.png": "missing image",
    }
    texts = pa.array(list(paths))
    cells: Any = {
        "struct": [{"bytes": None, "path": p} for p in paths],
        "category": texts.dictionary_encode(),
        "struct of categories": pa.StructArray.from_arrays(
            [pa.nulls(len(texts), pa.binary()), texts.dictionary_encode()], ["bytes", "path"]
        ),
    }.get(column, texts)
    table = pa.table({"prompt": ["a"] * len(paths), "chosen": cells, "rejected": [png(1)] * len(paths)})
    write_table(folder, table, kind)
    found = [row if isinstance(row, bytes) else row[0] for row in outcomes(folder).values()]
    assert found == list(paths.values())
    before = open_source(folder).identity()
    (folder / "images" / "a.png").write_bytes(png(2, 40))
    assert open_source(folder).identity() != before, "the images belong to the source"


def test_image_cells_of_other_types(tmp_path: Path) -> None:
    columns = [
        pa.array([png(0)], pa.large_binary()),
        pa.array([png(0)], pa.binary(len(png(0)))),
        pa.array([{"bytes": png(0), "path": "no.png"}]),
        pa.array([{"bytes": png(0)}]),
        pa.array([png(0)]).dictionary_encode(),
        pa.nulls(1),
        pa.array([{"bytes": None, "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.array([[png(0)]]),
        pa.array([7]),
        pa.array([{"x": 1}]),
        pa.array([{"bytes": 5, "path": "x"}]),
        pa.array([[[1, 2], [3, 4]]]),
    ]
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"prompt": ["a"], "chosen": column, "rejected": [png(1)]}), path)
        (found,) = outcomes(path).values()
        if number < 5:
            assert found == png(0)
        else:
            assert found[0] == "missing image"
            assert found[1]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array([png(0)]), pa.array([png(1)])],
        names=["prompt", "prompt", "chosen", "rejected"],
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="more than one column prompt"):
        open_source(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("[]", "not a JSON object"),
        ('{"_data_files": 5}', "_data_files"),
        ('{"_data_files": [5]}', "_data_files: 5 is no file name"),
        ('{"_data_files": [{"filename": "../../x.arrow"}]}', "inside the folder"),
        ('{"_data_files": [{"filename": "/dev/zero"}]}', "inside the folder"),
        ('{"_data_files": [{"filename": "fifo.arrow"}]}', "a FIFO"),
        ('{"_data_files": [{"filename": "a\\u0000b"}]}', "_data_files"),
        ('{"_data_files": null}', "cannot be read"),
        ("{" * 100_000, "JSON"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
        ('{"a": ' + "[" * 100_000, "JSON"),
    ],
)
@pytest.mark.timeout(60)
def test_wrong_types_in_the_state_of_a_data_set(tmp_path: Path, state: str, says: str) -> None:
    saved(tmp_path / "d")
    fifo(tmp_path / "d" / "fifo.arrow")
    (tmp_path / "d" / "state.json").write_text(state)
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "d")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("splits", ["5", "null", '["a/../b", "c"]', "[5]", '[".."]', "[]", '{"train": 1}'])
def test_wrong_types_in_the_splits_of_a_data_set(tmp_path: Path, splits: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    with pytest.raises(UserError, match="splits"):
        open_source(tmp_path)


COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")


def test_names_that_look_equal_match(tmp_path: Path) -> None:
    source = twins(tmp_path / "s", 1)
    for side, spelling, caption in (("chosen", COMPOSED, "txt"), ("rejected", DECOMPOSED, "")):
        (source / side / f"{spelling}.png").write_bytes(png(5))
        if caption:
            (source / side / f"{DECOMPOSED}.txt").write_text("a café")
    found = outcomes(source)
    assert found[f"chosen/{COMPOSED}"] == png(5)
    (source / "rejected" / f"{COMPOSED}.png").write_bytes(png(6))
    reason, detail = outcomes(source)[f"chosen/{COMPOSED}"]
    assert reason == "ambiguous name"
    assert "\\xe9.png" in detail
    assert "e\\u0301.png" in detail


def test_paths_that_look_equal_match(tmp_path: Path) -> None:
    (tmp_path / DECOMPOSED).mkdir()
    (tmp_path / DECOMPOSED / f"{COMPOSED}.png").write_bytes(png(0))
    (tmp_path / "l.png").write_bytes(png(1))
    write_jsonl(
        tmp_path,
        [
            {"prompt": "a", "chosen": f"{a}/{b}.png", "rejected": "l.png"}
            for a in (COMPOSED, DECOMPOSED)
            for b in "é"
        ],
    )
    assert list(outcomes(tmp_path).values()) == [png(0), png(0)]
    other = unicodedata.normalize("NFD", "Å")
    for name in (other, unicodedata.normalize("NFC", "Å")):
        (tmp_path / f"{name}.png").write_bytes(png(0))
    folder = Folder(tmp_path)
    assert folder.find(f"{other}.png").name == f"{other}.png", "the exact name wins"
    with pytest.raises(MissingImageError, match="look equal: rename one"):
        folder.find("\u212b.png")  # the sign for ångström


def test_a_failing_disk_is_no_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    source = twins(tmp_path / "s")
    pairs = open_source(source)
    (row,) = pairs.read([0])
    assert isinstance(row, PairRecord)

    def failing(path: Path, limit: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(listing, "read_bytes", failing)
    with pytest.raises(MachineError, match="Input/output error"):
        row.chosen()  # type: ignore[misc]


def test_a_listing_is_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/a", "a", "b.png", "B", "b-c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [entry.name for entry in list_files(tmp_path)] == ["B", "a", "b/a", "b-c", "b.png"]
