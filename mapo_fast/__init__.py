"""mapo_fast: preference fine-tuning of Stable Diffusion XL with MaPO (arXiv 2406.06424) on one GPU.

The base install (torch, safetensors, Triton where it exists) gives the loss, and `patch_unet` with
diffusers beside it; `mapo_fast[train]` adds the trainer. Importing this package imports neither torch nor
diffusers; using a name does.
"""

import logging
from typing import TYPE_CHECKING, Any

# On CPUs with AVX512-BF16 bitsandbytes warns, when it or peft is imported, that a kernel for 4-bit inference
# is not installed. Nothing here calls it, and every process of a run would say so.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)

__version__ = "0.1.0"
__all__ = ["MaPOLoss", "PreferenceLoss", "SFTLoss", "__version__", "patch_unet", "unpatch_unet"]

if TYPE_CHECKING:
    from mapo_fast.loss import MaPOLoss, PreferenceLoss, SFTLoss
    from mapo_fast.models.patch import patch_unet, unpatch_unet


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import mapo_fast` stays light."""
    if name in ("MaPOLoss", "PreferenceLoss", "SFTLoss"):
        from mapo_fast import loss

        return getattr(loss, name)
    if name in ("patch_unet", "unpatch_unet"):
        from mapo_fast.models import patch as fuse

        return getattr(fuse, name)
    raise AttributeError(f"module 'mapo_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names too, which are not there before their first use."""
    return sorted({*globals(), *__all__})
