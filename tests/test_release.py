"""A release is whole: one version, a complete source distribution, jobs that run what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import mapo_fast
from mapo_fast.data import index
from mapo_fast.run.folder import RunRecord
from mapo_fast.util import checkpoint
from tests.windows_job import windows_job

ROOT = Path(__file__).parent.parent


def test_every_file_names_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == mapo_fast.__version__ == citation["version"]


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_reader_needs(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    code = "from setuptools import build_meta as b; print(b.build_sdist('..'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name = f"mapo_fast-{mapo_fast.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        held = {file.removeprefix(f"{name}/") for file in archive.getnames()}
    for folder in ("docs", "examples", "recipes", "mapo_fast", "kernels"):
        files = {path for path in (tmp_path / "source" / folder).rglob("*") if path.is_file()}
        assert files
        assert {path.relative_to(tmp_path / "source").as_posix() for path in files} <= held
    assert {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py"} <= held
    assert not any(file.endswith(".pyc") or file.startswith("bench/") for file in held)


def test_the_page_on_stability_names_the_formats() -> None:
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*`(\w+\.json)`\)? \| (\d+) \| ([\d, and]+)[,:]", page, re.MULTILINE)
    stated = {file: (int(now), *map(int, re.findall(r"\d+", before))) for file, now, before in rows}
    assert stated == {
        "index.json": (index.FORMAT, *index.TAKEN_OVER),
        "run.json": (RunRecord.model_fields["format"].default, 1),
        "state.json": (checkpoint.FORMAT, 1),
    }


def test_the_workflow_runs_what_there_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step]
        for name, job in workflow["jobs"].items()
    }
    assert commands["linux"] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert f" -m {windows_job.__module__} " in commands["windows"][-1]


@pytest.mark.slow
def test_the_windows_job_runs_here_too(tmp_path: Path) -> None:
    assert windows_job(tmp_path).stat().st_size > 0
