"""Samplers by diffusers' schedulers, each with the model's own scheduler config.

| sampler           | diffusers                     | what is set besides the config                     |
|-------------------|-------------------------------|----------------------------------------------------|
| `euler`           | `EulerDiscreteScheduler`      |                                                    |
| `euler_ancestral` | `EulerAncestralDiscreteSch…`  |                                                    |
| `dpmpp_2m`        | `DPMSolverMultistepScheduler` | `dpmsolver++`, order 2                             |
| `dpmpp_2m_sde`    | `DPMSolverMultistepScheduler` | `sde-dpmsolver++`, order 2                         |
| `ddim`            | `DDIMScheduler`               | no clipping: latents are not within [-1, 1]        |

Betas, prediction type and zero terminal SNR always are the model's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from mapo_fast.models.pipeline import Pipeline
from mapo_fast.util.errors import UserError

_DPM = "DPMSolverMultistepScheduler"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": (_DPM, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": (_DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}
"""Samplers by ComfyUI's names: diffusers' class, and what is set in its config."""
SCHEDULES = ("normal", "karras")
WITHOUT_SCHEDULES = ("euler_ancestral", "ddim")
"""Samplers whose schedule cannot be chosen in diffusers."""


class Method(NamedTuple):
    """A sampling method: sampler, schedule and spacing."""

    sampler: str = "euler"
    """A key of `SAMPLERS`."""
    schedule: str | None = None
    """One of `SCHEDULES`; None keeps what the model's config says."""
    spacing: str | None = None
    """diffusers' `timestep_spacing`; None keeps the model's."""


def scheduler(folder: Pipeline, steps: int, method: Method = Method()) -> Any:  # noqa: B008 - it is immutable
    """diffusers' scheduler with the pipeline's own scheduler config, set to this many steps.

    Raises:
        UserError: the config cannot be used for sampling (diffusers finds some errors only while it samples),
            or diffusers' scheduler has no such schedule.
    """
    import diffusers

    if method.schedule == "karras" and method.sampler in WITHOUT_SCHEDULES:
        raise UserError(
            f"the sampler {method.sampler} has no schedule karras in diffusers: take normal, or dpmpp_2m"
        )
    kind, changes = SAMPLERS[method.sampler]
    config = {**folder.scheduler_config, **changes}
    if method.schedule is not None:
        config |= {"use_exponential_sigmas": False, "use_beta_sigmas": False}
        config["use_karras_sigmas"] = method.schedule == "karras"
    if method.spacing is not None:
        config["timestep_spacing"] = method.spacing
    if config.get("rescale_betas_zero_snr"):
        config["timestep_spacing"] = "trailing"  # only then the first step is at zero SNR (arXiv 2305.08891)
    try:
        with quiet_arrays():
            made = getattr(diffusers, kind).from_config(config)
            made.set_timesteps(steps)
    except Exception as error:  # of any kind: diffusers takes the fields as they are
        raise UserError(
            f"{folder.scheduler.where} cannot be sampled by in {steps} steps: "
            f"{(str(error).splitlines() or [''])[0]}; copy the file from the model again, or set another "
            "number of steps"
        ) from error
    return made


@contextmanager
def quiet_arrays() -> Iterator[None]:
    """Hide numpy 2's warning about how diffusers' schedulers turn a tensor into an array."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield
