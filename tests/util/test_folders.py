"""Folders: replaced whole, through links too, and tidied after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_fast.util.folders import new_folder, remove_halves


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("link", ["to a folder", "to nothing"])
def test_a_linked_result_folder_is_written_again_and_again(tmp_path: Path, link: str) -> None:
    (tmp_path / "unet").symlink_to(tmp_path / "moved")
    if link == "to a folder":
        (tmp_path / "moved").mkdir()
    for text in ("one", "two"):
        with new_folder(tmp_path / "unet") as folder:
            (folder / "a").write_text(text)
        assert (tmp_path / "unet" / "a").read_text() == text
    assert names_in(tmp_path) == (["moved", "unet"] if link == "to a folder" else ["unet"])


def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path) -> None:
    (tmp_path / ".unet.old").mkdir()
    (tmp_path / ".unet.old" / "a").touch()
    (tmp_path / ".unet.tmp").mkdir()
    remove_halves(tmp_path / "unet")
    assert names_in(tmp_path) == ["unet"]
    assert names_in(tmp_path / "unet") == ["a"]
