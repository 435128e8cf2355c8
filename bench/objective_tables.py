"""The docs' tables of objectives, from the registry."""

from __future__ import annotations

from mapo_kernels.objectives import OBJECTIVES, Objective, objective_key, objective_names


def named() -> str:
    """Table of the values of `objective.name`, with the settings of each."""
    lines = ["| `objective.name` | reference | settings and defaults |", "|---|---|---|"]
    for name in objective_names():
        known = OBJECTIVES[objective_key(name, form="code")]
        free = {key: setting for key, setting in known.settings.items() if setting.role == "free"}
        settings = ", ".join(f"{key} {setting.default:g}" for key, setting in free.items())
        lines.append(_row(f"`{name}`{known.about}", "yes" if known.reference else "no", settings))
    return "\n".join(lines)


def formulas() -> str:
    """Table of every objective's formula."""
    lines = [
        "| objective | f | logit z | reference | soft labels p | settings and defaults |",
        "|---|---|---|---|---|---|",
    ]
    labels = {"refused": "no", "optional": "yes", "required": "needed"}
    for name, known in OBJECTIVES.items():
        reference = "yes" if known.reference else "no"
        cells = f"`{name}`", known.loss, known.logit, reference, labels[known.labels], _settings(known)
        lines.append(_row(*cells))
    return "\n".join(lines)


def _settings(known: Objective) -> str:
    """The settings that are not ignored, with a symbol where it is not the setting's name."""
    return ", ".join(
        f"`{name}` {f'{one.symbol} ' if one.symbol else ''}{one.default:g}"
        for name, one in known.settings.items()
        if one.role != "ignored"
    )


def _row(*cells: str) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"
