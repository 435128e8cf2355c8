"""Copies of a run's figures for other programs: TensorBoard and Weights & Biases."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mapo_fast.util.errors import UserError


class TensorBoard:
    """TensorBoard files in a folder. Any method may raise the library's exceptions, such as `OSError`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the folder; figures of steps after `first_step` that are there already are hidden.

        Raises:
            ImportError: TensorBoard is not installed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter  # seconds

        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        try:
            self._writer: Any = SummaryWriter(
                str(folder), purge_step=first_step + 1 if first_step else 0, flush_secs=10
            )
        except BaseException:
            threading.excepthook = self._hook
            raise

    def add(self, figures: Iterable[tuple[str, float]], step: int, *, flush: bool = False) -> None:
        """Add scalars by name; with `flush` they are on the disk then."""
        for name, value in figures:
            self._writer.add_scalar(name, value, step)
        if flush:
            self._writer.flush()

    def add_images(self, images: Iterable[tuple[str, Path]], step: int) -> None:
        """Add pictures by name, from their files."""
        import numpy as np
        from PIL import Image

        for name, path in images:
            with Image.open(path) as image:
                self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write buffered figures and close the file."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _thread_failed(self, args: Any) -> None:
        """The writer's own thread would print a trace; its error comes back with the next figures."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._hook(args)


def find_wandb() -> Any:
    """The wandb module.

    Raises:
        UserError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb is set, but wandb is not installed (pip install wandb)") from None
    return wandb


def open_wandb(project: str, folder: Path) -> Any:
    """Start a wandb run that copies everything from TensorBoard; it has to start before TensorBoard.

    Raises:
        UserError: wandb is not installed, or does not start.
    """
    wandb = find_wandb()
    try:
        return wandb.init(project=project, name=folder.name, dir=str(folder), sync_tensorboard=True)
    except Exception as error:  # wandb's own types, and those of its transport
        raise UserError(
            f"train.wandb = {project!r}: Weights & Biases does not start ({error}); set WANDB_MODE=offline, "
            "or leave train.wandb out"
        ) from error
