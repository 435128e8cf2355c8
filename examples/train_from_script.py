"""Train an SDXL LoRA on preference pairs from Python, with progress shown by callbacks.

python examples/train_from_script.py --model sdxl.safetensors --data my_pairs --out my_run

The cache of encoded pairs goes to `OUT/cache`, the run to `OUT/run`. Run the same command again after an
interruption: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_fast import Callbacks, Config, FitResult, UserError, fit, prepare


class Progress(Callbacks):
    """Prints what happens; any other display is a class like this."""

    def message(self, text: str) -> None:
        """Print what is being done."""
        print(text)

    def warning(self, text: str, step: int | None = None) -> None:
        """Print what the user should know."""
        print(f"warning: {text}", file=sys.stderr)

    def step(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        """Print the loss of the last steps."""
        print(f"step {step} of {total}: loss {figures['loss']:.4f}")

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Print how the margin on held-out pairs has changed since the start."""
        if change := figures.get("margin_change"):  # single images, for kto, have no margin
            print(f"held-out margin at step {step}: {change['mean']:+.5f} against the start model")


def train(model: Path, data: Path, out: Path, resolution: int = 1024, steps: int = 600) -> FitResult:
    """Encode the pairs once, then train; a run that was interrupted goes on.

    Raises:
        UserError: a file or a setting is wrong; the message says what to change.
    """
    config = Config(
        model={"path": model},
        data={"source": data, "cache": out / "cache", "resolution": resolution, "held_out": 0.1},
        objective={"name": "mapo"},
        adapter={"kind": "lora", "rank": 16},
        optim={"name": "adamw8bit", "lr": 1e-5, "warmup_steps": 20},
        train={"output": out / "run", "steps": steps, "accumulation": 4, "log_every": 10},
    )
    prepare(config, callbacks=Progress())
    return fit(config, resume=(out / "run" / "run.json").exists(), callbacks=Progress())


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train an SDXL LoRA on preference pairs.")
    parser.add_argument("--model", type=Path, required=True, help="a .safetensors file or a pipeline folder")
    parser.add_argument("--data", type=Path, required=True, help="a folder of pairs; see docs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache and of the run")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=600)
    try:
        result = train(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not result.finished:
        print(f"stopped and saved at step {result.saved_step}: run the same command again to go on")
        return 130
    print(f"the LoRA is in {result.model}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
