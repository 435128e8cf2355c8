"""What CI runs on Windows after the install: `python -m tests.windows_job FOLDER`.

The commands get names with spaces and umlauts, and an output that takes Windows' western code page only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_sdxl
from tests.training import make_pairs

SETTINGS = (
    "data.resolution=32",
    "data.bucket_step=32",
    "data.max_crop=0.9",
    "adapter.rank=2",
    "train.steps=2",
    "train.precision=fp32",
    "train.accumulation=1",
    "preview.prompts=[]",
)


def windows_job(folder: Path) -> Path:
    """Make a tiny model and pairs, run the commands on them, and return the LoRA for ComfyUI."""
    home = folder / "Jörg Groß"
    make_tiny_sdxl(home / "Mein Modell")
    make_pairs(home / "Paare für Übung", 8)
    program = shutil.which("mapo-fast", path=Path(sys.executable).parent)
    assert program is not None, f"mapo-fast is not installed next to {sys.executable}"
    train = ["train", "--preset", "lora", "--model", "Mein Modell", "--data", "Paare für Übung"]
    train += ["--copy-to", "Für ComfyUI", *(word for one in SETTINGS for word in ("--set", one))]
    (home / "Für ComfyUI").mkdir()
    for arguments in (["doctor"], train):
        environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
        subprocess.run([program, *arguments], cwd=home, env=environment, check=True)
    [lora] = (home / "Für ComfyUI").iterdir()
    return lora


if __name__ == "__main__":
    print(ascii(str(windows_job(Path(sys.argv[1])))))
