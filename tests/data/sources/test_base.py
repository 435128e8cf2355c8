"""What all sources share."""

from pathlib import Path

from mapo_fast.data.sources.registry import open_source
from tests.data.pair_sources import png, write_jsonl


def test_identity_changes_with_the_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    before = open_source(tmp_path).identity()
    assert open_source(tmp_path).identity() == before
    (tmp_path / "b.png").write_bytes(png(0, 40))
    assert open_source(tmp_path).identity() != before
