"""The settings that A1111 or ComfyUI made a picture with, as far as they are settings of `Sampling`.

| setting           | A1111                      | ComfyUI                                              |
|-------------------|----------------------------|------------------------------------------------------|
| sampler, schedule | «Sampler», «Schedule type» | `sampler_name`, `scheduler` of the sampler           |
| steps, cfg        | «Steps», «CFG scale»       | `steps`, `cfg` of the sampler                        |
| width, height     | «Size»                     | the empty latent image that the sampler begins with  |
| negative          | «Negative prompt»          | the text of the sampler's negative input             |
| unconditional     | zeros                      | the encoded empty text; zeros by ConditioningZeroOut |
| spacing           | `linspace`: schedules begin at full noise | the same                              |

Prompt, seed and model are not settings here. What else a picture says is named, not guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mapo_fast.data.picture_graph import Nodes, encoded_text, linked, node_parts, nodes_of, samplers
from mapo_fast.data.picture_texts import A1111, NoPromptError, a1111_fields, a1111_parts, picture_texts
from mapo_fast.models.sampling import wrong
from mapo_fast.models.schedulers import WITHOUT_SCHEDULES
from mapo_fast.util.errors import UserError, printable

_LISTED = 8
"""Most names of ignored settings to list."""

_SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DDIM": "ddim",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
} | {name: name for name in ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "ddim")}
_SCHEDULES = {"Karras": "karras", "karras": "karras"} | dict.fromkeys(
    ("Uniform", "Normal", "normal"), "normal"
)
_NO_SETTINGS = ("Seed", "Model", "Model hash", "Version", "VAE hash", "Hashes")
"""A1111's fields that do not affect sampling."""
_USUAL_NODES = (
    "KSampler",
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "CLIPTextEncodeSDXL",
    "EmptyLatentImage",
    "ConditioningZeroOut",
    "PrimitiveString",
    "PrimitiveStringMultiline",
    "VAEDecode",
    "SaveImage",
    "PreviewImage",
)
"""ComfyUI's nodes that change nothing else."""


class PictureSettings(NamedTuple):
    """Settings of a picture."""

    values: dict[str, Any]
    """Values by the name of the setting in `Sampling`, all in range."""
    remark: str
    """One line about ignored settings; empty where there are none."""


def picture_settings(path: Path) -> PictureSettings:
    """The settings in a picture's file.

    Raises:
        UserError: there are none, or none that are certain.
        MachineError: I/O failed.
    """
    try:
        texts = picture_texts(path)
        if "parameters" in texts:
            values, unknown = _of_a1111(a1111_parts(texts["parameters"]))
        elif "prompt" in texts:
            values, unknown = _of_comfyui(nodes_of(texts["prompt"]))
        else:
            raise NoPromptError("it holds no settings of A1111 or ComfyUI")
    except NoPromptError as error:
        raise UserError(f"--like {path}: {error}") from None
    for name in [name for name, value in values.items() if wrong(name, value) is not None]:
        unknown.append(name)
        del values[name]
    if values.get("sampler") in WITHOUT_SCHEDULES and values.get("schedule") == "karras":
        unknown.append(f"schedule karras of {values['sampler']}")
        values["schedule"] = "normal"
    names = list(dict.fromkeys(printable(name)[:60] for name in unknown))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    remark = f"not taken from {path}: {', '.join(names[:_LISTED])}{more}" if names else ""
    return PictureSettings(values, remark)


def _of_a1111(parts: A1111) -> tuple[dict[str, Any], list[str]]:
    fields = a1111_fields(parts.settings)
    values: dict[str, Any] = {"negative": parts.negative, "unconditional": "zeros", "spacing": "linspace"}
    unknown = []
    for name, text in fields.items():
        if name == "Steps":
            values["steps"] = _number(text, int)
        elif name == "CFG scale":
            values["cfg"] = _number(text, float)
        elif name == "Size":
            values["width"], values["height"] = (
                _number(side, int) for side in (*text.split("x"), "", "")[:2]
            )
        elif name == "Sampler":
            unknown += _sampler(values, text, fields.get("Schedule type"))
        elif name not in (*_NO_SETTINGS, "Schedule type"):
            unknown.append(name)
    return values, unknown


def _sampler(values: dict[str, Any], text: str, schedule: str | None) -> list[str]:
    """Set sampler and schedule by A1111's names; older versions have the schedule in the sampler's name."""
    name, karras = text.removesuffix(" Karras"), text.endswith(" Karras")
    if name not in _SAMPLERS:
        return [f"sampler {text}"]
    values["sampler"] = _SAMPLERS[name]
    if schedule is None:
        schedule = "Karras" if karras else "Normal"
    if schedule == "Automatic":  # each sampler's own: exponential for DPM++ 2M SDE
        schedule = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Automatic"}.get(name, "Normal")
    if schedule not in _SCHEDULES:
        return [f"schedule {schedule} of {text}"]
    values["schedule"] = _SCHEDULES[schedule]
    return []


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    """The number in a text; None, which no setting may be, where it is not one."""
    try:
        return kind(text) if len(text) < 20 else None
    except ValueError:
        return None


def _of_comfyui(nodes: Nodes) -> tuple[dict[str, Any], list[str]]:
    inputs = _first_sampler(nodes)
    values: dict[str, Any] = {"unconditional": "empty", "spacing": "linspace"}
    values |= {name: inputs.get(name) for name in ("steps", "cfg")}
    unknown = []
    for name, field, known in (("sampler", "sampler_name", _SAMPLERS), ("schedule", "scheduler", _SCHEDULES)):
        found = inputs.get(field)
        if isinstance(found, str) and found in known:
            values[name] = known[found]
        else:
            unknown.append(f"{name} {found}" if isinstance(found, str) else name)
    (_, latent), _ = linked(nodes, inputs["latent_image"])
    values |= {name: latent.get(name) for name in ("width", "height")}
    try:
        (kind, _), _ = linked(nodes, inputs.get("negative"))
        if kind == "ConditioningZeroOut":
            values |= {"negative": "", "unconditional": "zeros"}
        else:
            values["negative"] = encoded_text(nodes, inputs.get("negative"))
    except NoPromptError:
        unknown.append("negative")
    if inputs.get("denoise", 1) != 1:
        unknown.append("denoise")
    kinds = {node_parts(node)[0] for node in nodes.values()}
    return values, [*unknown, *(f"node {kind}" for kind in sorted(kinds.difference(_USUAL_NODES)) if kind)]


def _first_sampler(nodes: Nodes) -> dict[str, Any]:
    """The inputs of the one sampler that begins with an empty image."""
    found = []
    for _, inputs in samplers(nodes):
        if "latent_image" in inputs:
            (kind, _), _ = linked(nodes, inputs["latent_image"])
            if kind.startswith("Empty"):
                found.append(inputs)
    if len(found) != 1:
        how_many = "no" if not found else "more than one"
        raise NoPromptError(f"its graph has {how_many} sampler that begins with an empty latent image")
    return found[0]
