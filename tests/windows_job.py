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

CONFIG = """\
[model]
path = "Mein Modell"

[data]
source = "Paare für Übung"
cache = "Vorbereitete Paare"
resolution = 32
bucket_step = 32

[adapter]
kind = "lora"
rank = 2

[train]
output = "Läufe/erster Lauf"
steps = 2
precision = "fp32"
"""


def windows_job(folder: Path) -> Path:
    """Make a tiny model and pairs, run the commands on them, and return the LoRA for ComfyUI."""
    home = folder / "Jörg Groß"
    make_tiny_sdxl(home / "Mein Modell")
    make_pairs(home / "Paare für Übung", 8)
    (home / "Größe 32.toml").write_text(CONFIG, encoding="utf-8")
    program = shutil.which("mapo-fast", path=Path(sys.executable).parent)
    assert program is not None, f"mapo-fast is not installed beside {sys.executable}"
    for arguments in (["doctor"], ["prepare", "Größe 32.toml"], ["train", "Größe 32.toml"]):
        environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
        subprocess.run([program, *arguments], cwd=home, env=environment, check=True)
    lora = home / "Läufe" / "erster Lauf" / "lora" / "lora_kohya.safetensors"
    assert lora.is_file()
    return lora


if __name__ == "__main__":
    print(ascii(str(windows_job(Path(sys.argv[1])))))
