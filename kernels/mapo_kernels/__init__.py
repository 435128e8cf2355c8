"""Fused Triton kernels for training diffusion UNets on preferences; needs torch, uses Triton if it is there.

Nothing here imports `mapo_fast`. The operators are in `ops`, a module each: registration and public function,
and its kernels and launchers. Long kernels have a module of their own, with an underscore, next to it.
The definitions in fp64 are in `reference`. `hardware` says what runs on a device, `weights` and `fp8` hold
what frozen layers store, `objectives` and `capability` are data.

Importing this package imports neither torch nor Triton; the first use of a public name does.
"""

from importlib import import_module
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapo_kernels._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import mapo_kernels` stays light.

    No public name is a module's: which of the two it meant would depend on what had been imported before.
    """
    if name == "__all__" or not (name.startswith("_") or PathFinder.find_spec(name, __path__)):  # noqa: F405
        public = import_module("mapo_kernels._public")
        if name in {*public.__all__, "__all__"}:
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names too, which are not there before their first use."""
    return sorted({*globals(), *__getattr__("__all__")})
