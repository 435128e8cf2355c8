"""Shards are checked before they are used again."""

import errno
from pathlib import Path
from typing import Any

import pytest

from mapo_fast.data import shards
from mapo_fast.data.prepare import prepare
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import (
    config,
    contents,
    jsonl_folder,
)
from tests.data.preparing import SHARDS, flip_byte


def test_unreadable_shard_stops_prepare(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    (copy / SHARDS[0]).write_bytes(b"not a shard")
    with pytest.raises(UserError, match=r"latents-00000\.safetensors is damaged .* delete it"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", SHARDS)
def test_prepare_never_takes_over_a_damaged_shard(
    tiny_sdxl: Path, prepared: Path, copy: Path, name: str, finished: bool
) -> None:
    run = config(tiny_sdxl, prepared.parent / "s", copy)
    flip_byte(copy / name)
    if not finished:
        (copy / "index.json").unlink()
    with pytest.raises(
        UserError, match=rf"{Path(name).name} is damaged \([^\n]+\): delete it and run prepare"
    ):
        prepare(run)
    (copy / name).unlink()
    prepare(run)
    assert contents(copy) == contents(prepared)


def test_shard_without_a_record_is_encoded_again(tiny_sdxl: Path, prepared: Path, copy: Path) -> None:
    # A kill between the two writes leaves this; nobody can say whether the shard is what was written.
    flip_byte(copy / SHARDS[0])
    (copy / SHARDS[0]).with_suffix(".sha256").unlink()
    (copy / "index.json").unlink()
    prepare(config(tiny_sdxl, prepared.parent / "s", copy))
    assert contents(copy) == contents(prepared)


def test_shard_folder_without_permission_is_not_taken_for_an_empty_one(
    tiny_sdxl: Path, prepared: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def refusing(self: Path) -> Any:
        if self.name == "shards":
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    (copy / "index.json").unlink()
    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(UserError, match=r"^cannot write .*shards: Permission denied$"):
        prepare(config(tiny_sdxl, prepared.parent / "s", copy))


def test_disk_full_while_writing(tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any, metadata: Any) -> str:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    source = jsonl_folder(tmp_path / "s", 4)
    run = config(tiny_sdxl, source, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", full)
        with pytest.raises(UserError, match=r"cannot write .*-00000.*: the disk is full"):
            prepare(run)
    assert not list((tmp_path / "c" / "shards").iterdir())
    assert prepare(run).pairs == 4
