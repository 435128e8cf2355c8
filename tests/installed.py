"""Environments that hold a few packages with what these require, made of links into the one of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def install(folder: Path, *packages: str) -> None:
    """Link the packages, and all that they require here, into an empty folder."""
    found: set[str] = set()
    wanted = [*packages]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found.add(name)
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)


def run(folder: Path, script: Path) -> str:
    """What a script prints where only the packages of `folder` and ours can be imported."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    command = [sys.executable, "-S", str(script)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
