"""mapo_fast: preference fine-tuning of Stable Diffusion XL with MaPO (arXiv 2406.06424) on one GPU.

The base install (torch, safetensors, Triton where it exists) gives the loss, and `patch_unet` if diffusers is
installed too; `mapo_fast[train]` adds `prepare`, `fit` and `plan`. Importing this package imports
neither torch nor diffusers; using a name does.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "Callbacks",
    "Config",
    "FailedRunError",
    "FitResult",
    "MaPOLoss",
    "MachineError",
    "Plan",
    "PlanResult",
    "PreferenceLoss",
    "PrepareResult",
    "SFTLoss",
    "UserError",
    "__version__",
    "fit",
    "load_config",
    "patch_unet",
    "plan",
    "prepare",
    "unpatch_unet",
]

_REMARKS = {
    # On CPUs with AVX512-BF16, when it or peft is imported: a kernel for 4-bit inference is not installed.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Of image processors, which SDXL does not use.
    "transformers.utils.import_utils": "requires torchvision (not installed)",
}
"""Log messages to hide, by logger: libraries warn in every process about parts that nothing here calls."""

for _logger in _REMARKS:
    logging.getLogger(_logger).addFilter(lambda record: _REMARKS[record.name] not in str(record.msg))

if TYPE_CHECKING:
    from mapo_fast.data.prepare import prepare
    from mapo_fast.data.summary import PrepareResult
    from mapo_fast.loss import MaPOLoss, PreferenceLoss, SFTLoss
    from mapo_fast.models.patch import patch_unet, unpatch_unet
    from mapo_fast.planner.answer import plan
    from mapo_fast.planner.plan import Plan, PlanResult
    from mapo_fast.run.folder import FitResult
    from mapo_fast.run.train import fit
    from mapo_fast.settings.load import load_config
    from mapo_fast.settings.schema import Config
    from mapo_fast.util.errors import FailedRunError, MachineError, UserError
    from mapo_fast.util.progress import Callbacks

_PLACES = {
    "Callbacks": "util.progress",
    "Config": "settings.schema",
    "FailedRunError": "util.errors",
    "MaPOLoss": "loss",
    "MachineError": "util.errors",
    "Plan": "planner.plan",
    "PlanResult": "planner.plan",
    "PreferenceLoss": "loss",
    "PrepareResult": "data.summary",
    "SFTLoss": "loss",
    "FitResult": "run.folder",
    "UserError": "util.errors",
    "load_config": "settings.load",
    "patch_unet": "models.patch",
    "plan": "planner.answer",
    "prepare": "data.prepare",
    "fit": "run.train",
    "unpatch_unet": "models.patch",
}
"""The module of each public name, which is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import mapo_fast` stays light."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mapo_fast' has no attribute {name!r}")
    try:
        module = import_module(f"mapo_fast.{_PLACES[name]}")
    except ModuleNotFoundError as missing:
        said = f"mapo_fast.{name} needs {missing.name}: pip install 'mapo_fast[train]'"
        raise ImportError(said, name=missing.name) from missing
    return getattr(module, name)


def __dir__() -> list[str]:
    """The public names too, which are not there before their first use."""
    return sorted({*globals(), *__all__})
