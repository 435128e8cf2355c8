"""The folders of runs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from mapo_fast.engine.reference import PrecomputedErrors
from mapo_fast.run.evaluate import HeldOutErrors, load_errors, save_errors
from mapo_fast.run.folder import check_output, recorded_settings
from mapo_fast.run.log import RunLog, read_log
from mapo_fast.util.records import WrongFileError
from tests.fuzz import mutations
from tests.fuzz.judge import FoundError, judge
from tests.fuzz.kind import Kind
from tests.training import make_config


class Run(Kind):
    """The folder of a run: run.json, checkpoints, log, a reference's errors."""

    name, weight = "run", 800

    def __init__(self, folder: Path, model: Path) -> None:
        from mapo_fast.run.folder import claim_output
        from mapo_fast.util.checkpoint import CheckpointStore

        super().__init__(folder, model)
        self.output = folder / "run"
        self.config = make_config(model, folder / "cache", self.output)
        self.identity = {"cache": "a", "start model": "b", "noise schedule": "c"}
        self.output.mkdir(parents=True)
        self.run = claim_output(self.config, self.identity)
        self.store = CheckpointStore(self.output / "checkpoints", 3, self.run)
        for step in (2, 4):
            self.store.save(step, {"model": {"w": torch.arange(4.0)}}, {"step": step, "numbers": [1.5, None]})
        with RunLog(self.output, 6, None) as log:
            for step in (1, 2, 3, 4):
                log.step(step, {"loss": 0.1, "chosen_error": 0.2, "saturated": 0.5, "skipped_steps": 0})
            change = {"mean": 0.0, "low": -1.0, "high": 1.0}
            log.evaluation(
                4, {"accuracy": 0.5, "chosen_error": 0.1, "chosen_error_change": change, "drift": 0.1}
            )
            log.warning(4, "a warning")
            log.end(4, finished=False)
        save_errors(self._start(), self.output / "start.safetensors", self.run)
        reference = self._reference()
        errors = (torch.full((2,), float(place)) for place in reference.positions())
        list(reference.compute(errors))
        shutil.rmtree(self.output / "tensorboard", ignore_errors=True)
        self.files = [
            p
            for p in self.output.rglob("*")
            if p.is_file() and p.suffix in (".json", ".jsonl", ".safetensors")
        ]

    def _start(self) -> HeldOutErrors:
        return HeldOutErrors(torch.rand(2, 8), torch.rand(2, 8), [torch.rand(2, 4, 4, 4).half()] * 2)

    def _reference(self) -> PrecomputedErrors:
        batches: Any = SimpleNamespace(pairs_per_batch=1)
        return PrecomputedErrors(self.output / "reference", {"run": 1}, batches, 5, torch.device("cpu"))

    def case(self, random: Random) -> str:
        """What `train --resume` reads before it writes."""
        path = random.choice(self.files)

        def call() -> None:
            recorded_settings(self.output)
            check_output(self.config, self.identity, resume=True)
            checkpoint = self.store.newest()
            if checkpoint is not None:
                list(checkpoint.views("model"))
            read_log(self.output / "log.jsonl")
            held_out: Any = SimpleNamespace(
                pairs=[0, 1], shapes=((2, 8), (2, 8)), cache=SimpleNamespace(paired=True)
            )
            with suppress(WrongFileError):
                load_errors(self.output / "start.safetensors", self.run, held_out)
            reference = self._reference()
            for position in range(5 - reference.missing):
                if reference.at(position, 1).tolist() != [position] * 2:
                    raise FoundError("errors of a reference are wrong")

        damage = mutations.of_bytes if path.suffix == ".safetensors" else mutations.of_json
        if path.suffix == ".jsonl":
            damage = of_lines
        return self.on(random, path, damage, call, names=(str(self.output),), unchanged=self.output)


class Log(Kind):
    """A log that a resumed run goes on with."""

    name, weight = "log", 600

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.lines = Run(folder / "made", model).output / "log.jsonl"

    def case(self, random: Random) -> str:
        """Replayed into the monitor; the log may be rewritten, which is its business."""
        folder = self.folder / "resumed"
        folder.mkdir()
        path = folder / "log.jsonl"
        path.write_bytes(of_lines(random, self.lines.read_bytes()))

        def call() -> None:
            with RunLog(folder, 6, None, start_step=random.choice((0, 3, 4))) as log:
                log.step(5, {"loss": 0.1, "chosen_error": 0.2})
            read_log(path)

        try:
            return judge(call, (path.name,))
        finally:
            shutil.rmtree(folder)


def of_lines(random: Random, text: bytes) -> bytes:
    """Damage to one line of JSON lines, or to their order."""
    lines = text.split(b"\n")
    place = random.randrange(len(lines))
    how = random.randrange(6)
    if how == 0:
        random.shuffle(lines)
    elif how == 1:
        lines[place] = mutations.monster(random)
    elif how == 2:
        return mutations.of_bytes(random, text)
    else:
        lines[place] = mutations.of_json(random, lines[place] or b"{}")
    return b"\n".join(lines)
