"""Folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mapo_fast.util.files import fsync


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty temporary folder next to `target`; on success fsync all of it and rename it to `target`.

    An existing folder at `target` is moved aside just before and deleted just after. On any error the
    temporary folder is removed and `target` stays. Where `target` is a link to a folder, that folder is
    replaced.
    """
    target = target.resolve() if target.is_dir() else target
    temporary, aside = _beside(target)
    remove_halves(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            fsync(path)
        fsync(temporary)
        if os.path.lexists(target):
            target.rename(aside)
        temporary.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(aside) and not os.path.lexists(target):
            aside.rename(target)
        raise
    delete(aside)


def remove_halves(target: Path) -> None:
    """Clean up next to `target` after a kill in `new_folder`; a folder that was moved aside comes back."""
    temporary, aside = _beside(target)
    delete(temporary)
    if os.path.lexists(aside) and not os.path.lexists(target):
        aside.rename(target)
    delete(aside)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")


def delete(path: Path) -> None:
    """Delete a folder with all in it, a file, or a link but not what it leads to; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
