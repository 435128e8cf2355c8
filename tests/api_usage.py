"""The Python API as its users' type checkers see it; `mypy` reads this file and nobody runs it."""

from pathlib import Path
from typing import Any, assert_type

from mapo_fast import (
    Callbacks,
    Config,
    FailedRunError,
    FitResult,
    MachineError,
    Plan,
    PlanResult,
    PrepareResult,
    UserError,
    fit,
    load_config,
    plan,
    prepare,
)


class Figures(Callbacks):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: int, total: int, figures: Any) -> None:
        """Keep the loss."""
        self.losses.append(figures["loss"])


def use(path: str) -> Path | None:
    """Every name of the API."""
    config = load_config(path, ["optim.lr=1e-5"])
    assert_type(config, Config)
    data = {"source": Path("pairs"), "cache": "cache"}
    config = Config(model={"path": "sdxl"}, data=data, train=config.train, adapter={"rank": 4})
    try:
        made = prepare(config, callbacks=Figures())
        assert_type(made, PrepareResult)
        found = plan(config, card="RTX 4090", ram="64GiB")
        assert_type(found, PlanResult)
        assert_type(found.chosen, Plan | None)
        if found.chosen is not None:
            assert_type(found.chosen.ms, float)
            config = found.chosen.apply(config)
        result = fit(config, resume=True)
        assert_type(result, FitResult)
    except (MachineError, FailedRunError, UserError) as error:
        assert_type(error.exit_code, int)
        return None
    return result.model
