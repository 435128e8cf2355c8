"""Small preference data sets in every layout, and the config that prepares them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config


def picture(seed: int, height: int = 32, width: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(seed: int, height: int = 32, width: int = 32) -> bytes:
    return encoded(picture(seed, height, width))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jsonl_folder(folder: Path, pairs: int = 12, *, prompts: int | None = None, height: int = 32) -> Path:
    """`pairs` rows with images of their own; row i has prompt number i modulo `prompts`."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(pairs):
        for side, name in enumerate("wl"):
            (folder / f"{i}{name}.png").write_bytes(png(2 * i + side, height))
        rows.append(
            {
                "prompt": f"a red thing {i % (prompts or pairs)}",
                "chosen": f"{i}w.png",
                "rejected": f"{i}l.png",
            }
        )
    write_jsonl(folder, rows)
    return folder


def write_jsonl(folder: Path, rows: list[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pickapic_rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows in Pick-a-Pic's columns; even rows choose jpg_0, odd rows jpg_1."""
    return [
        {
            "jpg_0": png(2 * i),
            "jpg_1": png(2 * i + 1),
            "label_0": float(i % 2 == 0),
            "label_1": float(i % 2 == 1),
            "caption": f"a blue thing {i}",
            "has_label": True,
            **changes,
        }
        for i in range(count)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path


def config(model: Path, source: Path, cache: Path, **data: Any) -> Config:
    settings = {"source": str(source), "cache": str(cache), "resolution": 32, "bucket_step": 8, **data}
    return parse_config(
        {"model": {"path": str(model)}, "data": settings, "train": {"output": str(cache / "never")}}
    )


def skipped(cache: Path) -> dict[str, str]:
    """Row name → reason."""
    lines = (cache / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["row"]: row["reason"] for row in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def write_table(folder: Path, table: pa.Table, kind: str) -> None:
    """A folder with a table in a `parquet` or an `arrow` file."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        with (
            pa.OSFile(str(folder / "a.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)


def snapshot(folder: Path) -> Path:
    """Make a folder what the Hub's cache makes of it: files are links to blobs without suffix."""
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = folder.parent / "blobs" / f"{number:040x}"
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    return folder
