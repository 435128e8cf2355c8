"""A GPU's memory in a run: how torch allocates it, how much is available, and a cap.

Expandable segments. A step's tensors have hundreds of sizes, so torch's allocator reserves more memory than
the tensors take: 8 % of a full fine-tune's 10.8 GiB by default and 0.7 % with `expandable_segments`
(replayed, see `planner/replay.py`). So they are switched on, except where the user has configured the
allocator, on Windows, where torch has none, and under WSL, where drivers reject them (pytorch#192330).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F

from mapo_fast.hardware.allocator import LARGE_SEGMENT, MIB, Rules
from mapo_fast.hardware.cards import CONTEXT_GIB
from mapo_fast.hardware.host import in_wsl
from mapo_fast.util.errors import UserError

DISPLAY_GIB = 0.5
"""GiB that a desktop may take during a run."""
_EXPANDABLE = "expandable_segments"


# --- torch's allocator ---


def users_settings() -> str:
    """How the user has configured torch's allocator, "" for not at all.

    Raises:
        UserError: torch cannot read it.
    """
    name = next((n for n in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if n in os.environ), "")
    tell = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # older versions do not
    try:
        told = "" if tell is None else str(tell())
    except (RuntimeError, ValueError) as error:  # it reads the variable when it is first asked
        raise UserError(
            f"torch cannot read {name} = {os.environ.get(name)!r} ({str(error).splitlines()[0]}): correct "
            "it, or unset it to have the settings of mapo-fast"
        ) from None
    return os.environ.get(name, told)


def planned_rules() -> Rules:
    """Allocator rules of a run on this machine: the user's settings, else expandable segments."""
    if chosen := users_settings():
        return parse_rules(chosen)
    return Rules(expandable=sys.platform == "linux" and not in_wsl())


def choose_rules(device: torch.device) -> Rules:
    """Switch expandable segments on where possible, before the first large allocation; returns the rules."""
    rules = planned_rules()
    if not rules.expandable or users_settings():
        return rules
    _tell_allocator(f"{_EXPANDABLE}:True")
    try:
        _try(device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return rules
        # The driver has no virtual memory management.
        _tell_allocator(f"{_EXPANDABLE}:False")
        return Rules()
    return rules


def _tell_allocator(settings: str) -> None:
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (tell or torch.cuda.memory._set_allocator_settings)(settings)  # its older name


def _try(device: torch.device) -> None:
    torch.empty(2 * MIB, dtype=torch.uint8, device=device)


def parse_rules(text: str) -> Rules:
    """The allocator's rules under settings such as "expandable_segments:True,max_split_size_mb:128".

    torch itself rejects unknown settings. Of a list of divisions the coarsest is taken; 0 and 1 divide
    nothing.
    """
    expandable = re.search(rf"{_EXPANDABLE}\s*:\s*true", text, re.IGNORECASE) is not None
    divisions = re.search(r"roundup_power2_divisions\s*:\s*(\[[^\]]*\]|\d+)", text)
    counts = [] if divisions is None else [int(n) for n in re.findall(r"(?:^|:)\s*(\d+)", divisions[1])]

    sizes = {name: int(size) * MIB for name, size in re.findall(r"(\w+)_mb\s*:\s*(\d+)", text)}
    return Rules(
        expandable=expandable and sys.platform != "win32",
        max_split=sizes.get("max_split_size"),
        divisions=min((count for count in counts if count > 1), default=1),
        segment=sizes.get("large_segment_size", LARGE_SEGMENT),
        rounding=sizes.get("max_non_split_rounding", LARGE_SEGMENT),
    )


# --- How much memory there is ---


def available(device: torch.device) -> int:
    """Bytes that this process can have, context included, once the libraries have loaded.

    Memory that torch has cached and does not use counts as available; half a GiB is kept for a display.

    Raises:
        UserError: almost no memory is free.
    """
    try:
        load_libraries(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the GPU has no memory free: other programs hold it (nvidia-smi lists them); close them, or hide "
            "the GPU (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        ) from error
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    there = free(device) + cached + int(CONTEXT_GIB * 2**30)  # asking has made the context
    return there - (int(DISPLAY_GIB * 2**30) if drives_display(device) else 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error is the allocator's own, or that of a library that could not allocate memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED"))


def free(device: torch.device) -> int:
    """Free bytes on the card."""
    return int(torch.cuda.mem_get_info(device)[0])


def load_libraries(device: torch.device) -> None:
    """Load the libraries of a step: cuBLAS, cuDNN and attention kernels take memory at first use."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    x = torch.zeros(1, 64, 16, 16, dtype=dtype, device=device, requires_grad=True)
    weight = torch.zeros(64, 64, 3, 3, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad():
        y = F.conv2d(x, weight, padding=1).flatten(2).transpose(1, 2)
        y = y @ weight[:, :, 1, 1]
        heads = y.view(1, 1, 256, 64)
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # a run makes its own, which the plan counts
    torch.cuda.empty_cache()


def drives_display(device: torch.device) -> bool:
    """Whether a desktop shares the card; under Windows one always may."""
    if sys.platform == "win32" or in_wsl():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = [program, card, "--query-gpu=display_active", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return answer.strip().lower() == "enabled"
    return False


# --- The cap ---


def cap(nbytes: float, device: torch.device) -> None:
    """Let torch reserve at most this many bytes; without a cap a driver may silently go on in system RAM."""
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index  # torch asks for one
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, nbytes / total)), index)


@contextmanager
def capped(vram: int | None) -> Iterator[None]:
    """Cap what torch reserves within this context.

    The cap is the free memory, or `vram` bytes with the CUDA context if that is less.

    Nothing happens without an NVIDIA GPU.

    Raises:
        UserError: almost no memory is free.
    """
    if not torch.cuda.is_available():
        yield
        return
    device = torch.device("cuda", torch.cuda.current_device())
    choose_rules(device)
    there = available(device)
    cap((there if vram is None else min(there, vram)) - CONTEXT_GIB * 2**30, device)
    try:
        yield
    finally:
        uncap(device)


def uncap(device: torch.device) -> None:
    """Remove the cap; nothing happens where an error has left the device unusable."""
    with suppress(RuntimeError):
        cap(float("inf"), device)
