"""Runs under `runs/` that have not ended, and their settings: for `mapo-fast train --resume` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mapo_fast.run.folder import RECORD, RESULTS
from mapo_fast.run.starts import last_settings
from mapo_fast.settings.load import load_config
from mapo_fast.settings.places import RUNS
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import UserError

_STATED = ("preset", "file", "command line", "stated", "epochs")
"""Sources of settings that a run has to keep; the others are chosen again."""


def unfinished(output: Path | None) -> Path:
    """The folder of the run to continue: the one that is named, or the only one in `runs/` without a result.

    Raises:
        UserError: there is none, or there are several.
    """
    if output is not None:
        return output
    records = sorted(RUNS.glob(f"*/{RECORD}"))
    found = [r.parent for r in records if not any((r.parent / name).exists() for name in RESULTS)]
    if not found:
        raise UserError(f"--resume: no run in {RUNS.resolve()} is unfinished; name its folder with --out")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"--resume: several runs are unfinished, {names}: name one with --out")
    return found[0]


def settings_of(output: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings that the run in a folder was last started with, with overrides.

    Raises:
        UserError: there is no run, its `settings.json` is missing or cannot be read, or an override is wrong.
    """
    had = last_settings(output)
    kept = {name: entry["value"] for name, entry in had.items() if entry["from"] in _STATED}
    kept |= {name: had[name]["value"] for name in ("data.cache", "train.output") if name in had}
    kept["train.output"] = str(output)
    texts = [f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in kept.items() if v is not None]
    config = load_config(None, [*texts, *overrides])
    replaced = {override.partition("=")[0].strip() for override in overrides}
    sources = {name: had[name]["from"] for name in kept if name in had and name not in replaced}
    return config.from_sources({**config.sources, **sources})
