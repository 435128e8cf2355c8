"""An output folder belongs to one run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mapo_fast.run.folder import (
    check_output,
    check_results,
    claim_output,
    recorded_settings,
    remove_leftovers,
)
from mapo_fast.settings.declare import Setting
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import TABLE
from mapo_fast.util.errors import UserError
from mapo_fast.util.records import write_record

IDENTITY = {"cache": "a", "start model": "b"}


def _config(output: Path, **sections: dict[str, object]) -> Config:
    train = {"output": str(output), **sections.pop("train", {})}
    return parse_config({"model": {"path": "m"}, "data": {"cache": "c"}, "train": train, **sections})


def test_a_new_or_empty_folder_is_claimed(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "new" / "run"):
        check_output(_config(output), IDENTITY, resume=False)
        output.mkdir(parents=True, exist_ok=True)
        claim_output(_config(output), IDENTITY)
        assert json.loads((output / "run.json").read_text())["identity"] == IDENTITY


def test_a_killed_claim_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.123.tmp").write_text("{")
    check_output(_config(tmp_path), IDENTITY, resume=True)


def test_another_run_is_never_written_to(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        check_output(_config(tmp_path), IDENTITY, resume=False)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match="not an empty folder"):
            check_output(_config(tmp_path), IDENTITY, resume=resume)
    with pytest.raises(UserError, match="not an empty folder"):
        check_output(_config(tmp_path / "photo.png"), IDENTITY, resume=False)


def test_a_run_with_a_removed_optimizer_says_what_to_do(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    record = json.loads((tmp_path / "run.json").read_text())
    record["config"]["optim"]["name"] = "paged_adamw8bit"
    write_record(tmp_path / "run.json", {key: value for key, value in record.items() if key != "sha256"})
    for name in ("adamw", "adamw8bit"):
        with pytest.raises(
            UserError, match=r"optim\.name was 'paged_adamw8bit', and it was removed"
        ) as caught:
            check_output(_config(tmp_path, optim={"name": name}), IDENTITY, resume=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"optim\.name = \"?'?paged_adamw8bit.*it was removed"):
        _config(tmp_path, optim={"name": "paged_adamw8bit"})


def test_a_resume_may_change_what_leaves_the_updates_alone(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    changed = _config(tmp_path, train={"steps": 7, "layout": "joint", "log_every": 3}, preview={"steps": 9})
    check_output(changed, IDENTITY, resume=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"lr": 1e-3}}, r"optim\.lr was 1e-05 and is now 0\.001"),
        ({"train": {"seed": 4}}, r"train\.seed was 0 and is now 4"),
        ({"adapter": {"rank": 4}}, r"adapter\.rank was 16 and is now 4"),
        ({"train": {"evaluate_pairs": 4}}, r"train\.evaluate_pairs was 64"),
    ],
)
def test_a_resume_with_other_arithmetic_is_refused_by_name(
    tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    with pytest.raises(UserError, match=message):
        check_output(_config(tmp_path, **sections), IDENTITY, resume=True)


AS_OLD_AS_RUNS = ("train.accumulation", "optim.schedule")


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in TABLE if r.name not in AS_OLD_AS_RUNS], ids=lambda r: r.name)
def test_a_setting_younger_than_the_run_had_its_default(tmp_path: Path, row: Setting) -> None:
    config = _config(tmp_path)
    claim_output(config, IDENTITY)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["config"][row.section][row.key], record["sha256"]
    write_record(tmp_path / "run.json", record)
    check_output(config, IDENTITY, resume=True)


def test_a_setting_that_this_version_does_not_know_is_named(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    record = json.loads((tmp_path / "run.json").read_text())
    record["config"]["optim"]["momentum"] = 0.5
    del record["sha256"]
    write_record(tmp_path / "run.json", record)
    with pytest.raises(UserError, match=r"optim\.momentum was 0\.5 and is now None"):
        check_output(_config(tmp_path), IDENTITY, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.required or len(row.choices) > 1], ids=lambda r: r.name
)
def test_a_resume_may_change_what_is_not_arithmetic(tmp_path: Path, row: Setting) -> None:
    """Each setting, in the record: whatever else a value is checked by has no part in it."""
    config = _config(tmp_path)
    claim_output(config, IDENTITY)
    record = json.loads((tmp_path / "run.json").read_text())
    record["config"][row.section][row.key] = "elsewhere" if row.required else row.choices[1]
    del record["sha256"]
    write_record(tmp_path / "run.json", record)
    if "arithmetic" not in row.affects:
        check_output(config, IDENTITY, resume=True)
        return
    with pytest.raises(UserError, match=rf"{re.escape(row.name)} was .* and is now"):
        check_output(config, IDENTITY, resume=True)


def test_a_resume_on_other_data_or_another_model_is_refused(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    with pytest.raises(UserError, match="the start model is not the one"):
        check_output(_config(tmp_path), {**IDENTITY, "start model": "z"}, resume=True)
    with pytest.raises(UserError, match="the cache is not the one"):
        check_output(_config(tmp_path), {**IDENTITY, "cache": "z"}, resume=True)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"config": 3}', "\x00", "[" * 200_000, '{"a": ' + "9" * 5000 + "}", '{"format": 2}']
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json (cannot be read|is not a JSON object|does not match)"):
        check_output(_config(tmp_path), IDENTITY, resume=True)


@pytest.mark.parametrize(("old", "new"), [('"rank": 16', '"rank": 17'), ('"version": "', '"version": "1')])
def test_a_changed_record_is_not_trusted(tmp_path: Path, old: str, new: str) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    path = tmp_path / "run.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"run\.json does not match its checksum"):
        check_output(_config(tmp_path, adapter={"rank": 17}), IDENTITY, resume=True)
    assert recorded_settings(tmp_path) is None


def test_a_record_of_format_1_with_text_for_a_number_is_named(tmp_path: Path) -> None:
    claim_output(_config(tmp_path), IDENTITY)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    for name in ("format", "run", "sha256"):
        del record[name]
    record["config"]["train"]["accumulation"] = "x"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        check_output(_config(tmp_path), IDENTITY, resume=True)


def test_leftovers_of_kills_are_removed_and_nothing_else(tmp_path: Path) -> None:
    leftovers = [
        ".run.json.12.tmp",
        ".held_out_start.safetensors.7.tmp",
        ".tmpAb3dEf",
        "reference/.errors-000000.safetensors.3.tmp",
        "reference/.tmpAb3dEf",
        "scheduler/.scheduler_config.json.9.tmp",
        ".unet.tmp/part",
        ".lora.old/part",
    ]
    kept = [".lock", "run.json", "lora/part", ".notes.tmp", ".tmp", "reference/errors-000000.safetensors"]
    for name in leftovers + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()]
    assert sorted(found) == sorted(kept)


def test_steps_are_fixed_where_the_schedule_depends_on_them(tmp_path: Path) -> None:
    cosine = {"optim": {"schedule": "cosine"}}
    claim_output(_config(tmp_path, **cosine), IDENTITY)
    with pytest.raises(UserError, match=r"train\.steps was 1000 and is now 2000"):
        check_output(_config(tmp_path, train={"steps": 2000}, **cosine), IDENTITY, resume=True)


def test_a_result_without_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    check_results(tmp_path)
    (tmp_path / "lora").mkdir()
    with pytest.raises(UserError, match="holds the result lora/ but no checkpoint"):
        check_results(tmp_path)
