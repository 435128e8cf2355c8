"""What a run leaves for plain diffusers and other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mapo_fast.checkpoint import save_unet
from mapo_fast.config import Config
from mapo_fast.distributed import Processes
from mapo_fast.files import disk_errors, write_json
from mapo_fast.lora import save_lora
from mapo_fast.model import SDXLFolder
from mapo_fast.tensorparts import whole


def export(
    config: Config, unet: Any, tensors: Mapping[str, Tensor], folder: SDXLFolder, processes: Processes
) -> None:
    """Write the LoRA or the UNet, and the scheduler config it was trained under, to `train.output`.

    Args:
        unet: the one that was trained.
        tensors: what was trained, by name; all processes bring their parts.
    """
    output = config.train.output
    complete = whole(tensors, keep=processes.main)

    def write() -> None:
        if config.adapter.kind == "lora":
            save_lora(unet, output / "lora")
        else:
            save_unet(unet, output / "unet", complete)
        with disk_errors(output):
            (output / "scheduler").mkdir(exist_ok=True)
        write_json(output / "scheduler" / "scheduler_config.json", folder.scheduler_config)

    processes.once(write)
