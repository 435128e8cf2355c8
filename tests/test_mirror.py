"""Tests mirror the code: a change of `mapo_fast/ROOM/X.py` has its tests in `tests/ROOM/test_X.py`."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
ROOMS = [path for path in (TESTS.parent / "mapo_fast").iterdir() if (TESTS / path.name).is_dir()]

OF_SEVERAL_MODULES = {
    "demo/test_assets.py": "the files that the package carries",
    "engine/test_extend_objective.py": "an objective from outside",
    "engine/test_extend_optimizer.py": "an optimizer from outside",
    "engine/test_kto.py": "single images, from their rows to the update",
    "engine/test_no_sync.py": "a step waits for nothing on the device",
    "engine/test_speed.py": "the switches of [speed] change no step",
    "models/test_lora_rounding.py": "a LoRA from its file into weights, rounded once",
    "run/test_adapter_start.py": "a run that goes on training a LoRA",
    "run/test_endings.py": "whatever ends a run",
    "studio/test_pages.py": "the studio in a browser",
    "run/test_plans.py": "whole runs under the plans of the memory table",
}


def test_every_test_file_is_of_a_module_or_listed() -> None:
    assert len(ROOMS) >= 9
    files = [file for room in ROOMS for file in (TESTS / room.name).rglob("test_*.py")]
    names = {file.relative_to(TESTS).as_posix() for file in files}
    of_one = {n for n in names if (TESTS.parent / "mapo_fast" / n.replace("/test_", "/")).is_file()}
    assert names - of_one == OF_SEVERAL_MODULES.keys()
