"""The objectives as plain data: names, settings, needs and formulas. It imports the standard library only.

e_w and e_l are the mean squared errors of the chosen and the rejected sample, r_w and r_l the same errors of
a frozen reference model (0 where an objective has none). An objective maps them to a loss, a logit and the
slopes dloss/de_w and dloss/de_l; everything else about a paired loss is shared. That arithmetic, its terms,
is named here and imported when it first runs. In the formulas

    m = (r_w − e_w) − (r_l − e_l)    the margin: how much more the model improved on the chosen sample than on
                                     the rejected one; in the usual notation −Δ
    u = ½βm                          L(z) = −logσ(z)

Sources: MaPO's code form from the authors' released code, its paper forms from arXiv 2406.06424 eq. 9–11;
dpo, ipo and hinge from Diffusion-DPO and its diffusers example; kto from Diffusion-KTO; npo from
Diffusion-NPO; smpo, dmpo and linear_dpo from their released code; orpo with the sign of diffusers' example
corrected; simpo and cpo carried over from language models.

Soft labels p, the probability that the chosen sample really is the better one, replace L(z) by
p·L(z) + (1 − p)·L(−z) (label smoothing, cDPO). An e_w outside L stays as it is. The objectives without an L
refuse labels; dmpo has its own smoothing α.

The terms are fp64. The scores s(e) = z/(exp z − 1), z = λe, of two nearly equal errors cancel when
subtracted, and T = 1000 amplifies what is left: in fp32 the released code's logit is off by up to 33. In
fp64 the plain formulas keep ≥ 12 digits.

`register_objective` adds one from outside; `docs/extend/objective.md` says how.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

MOST_SETTINGS = 3
"""Most settings that the kernel takes; an objective with fewer gets zeros for the others."""


class Setting(NamedTuple):
    """A scalar of an objective; it must lie strictly between `low` and `high`."""

    default: float
    low: float = 0.0
    high: float = math.inf
    role: Literal["free", "schedule", "ignored"] = "free"
    """`free`: a config may set it. `schedule`: the noise schedule sets it, by the setting's name. `ignored`:
    accepted, for calls that serve several objectives, and not used."""
    symbol: str = ""
    """Its symbol in formulas, where that is not its name."""
    advice: str = ""
    """Makes the setting required in a config: says when to set it and which values are in use. The default is
    then for callers of the loss only."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the loss, the settings, the trainer and the documentation have to know about an objective.

    `chosen` and `rejected` name the halves as the data have them (of single images: wanted and unwanted), in
    results, logs and held-out figures alike, whatever an objective does with them.
    """

    terms: str
    """"module:NAME" of its `mapo_kernels.terms.Terms`."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """At most three, in the order in which the terms take them."""
    reference: bool = False
    """Whether it needs a reference model's errors; one that does not need them refuses them."""
    labels: Literal["refused", "optional", "required"] = "refused"
    """Whether it takes soft labels of pairs."""
    swapped: bool = False
    """Whether its terms get the rejected half in the chosen one's place and the other way round, so that they
    prefer what the data reject. Logits are then of what it is trained for; errors keep their names."""
    single: str | None = None
    """"module:name" of its terms of single samples, each wanted or not: a function of
    `mapo_kernels.terms.Samples` and the settings that returns `SampleTerms`. The trainer then takes single
    images, and `terms` serve those who have pairs."""
    baseline: bool = False
    """Whether it compares with the mean gain of an optimizer step's samples (`kto_baseline`)."""
    named: Mapping[str, str] = field(default_factory=dict)
    """`name`, `form` and `reading` of a config that mean it, where the key alone is not its name."""
    loss: str = ""
    """Formula, for the documentation."""
    logit: str = ""
    """Formula of the logit z, for the documentation."""
    about: str = ""
    """Text after its name in the documentation."""

    @property
    def samples(self) -> Literal["pair", "single"]:
        """What the trainer gives it: pairs, or single images with labels."""
        return "single" if self.single else "pair"

    @property
    def labelled(self) -> bool:
        """Whether the trainer gives it labels: soft ones of pairs, or which single images are wanted."""
        return self.samples == "single" or self.labels == "required"


def _mapo(beta: Setting, role: Literal["free", "schedule", "ignored"] | None = None) -> dict[str, Setting]:
    """One set of settings for MaPO's forms and their control `sft`; a form ignores what it does not use."""
    return {
        "beta": beta,
        "snr": Setting(0.5, role=role or "free", symbol="λ"),
        "num_train_timesteps": Setting(1000.0, role=role or "schedule", symbol="T"),
    }


_PAPER_BETA = Setting(
    0.1,
    advice="objective.form = 'paper'; the paper used 8 for general preference, 32 for culture, 64 for safety "
    "and style, 1024 for personalisation",
)
_DIFFUSION_DPO = {"beta": Setting(5000.0)}
"""The defaults of the authors and of diffusers' example, which has one for all its losses."""
_UNREFERENCED_BETA = Setting(250.0)
"""Ours, as none is released: the slope T·λ/2 of MaPO's logit at small errors."""

_TERMS = "mapo_kernels.ops._objective_terms"

OBJECTIVES: dict[str, Objective] = {
    "mapo_code": Objective(
        terms=f"{_TERMS}:MAPO_CODE",
        settings=_mapo(Setting(0.1)),
        labels="optional",
        named={"name": "mapo", "form": "code"},
        loss="e_w + β·L(z)",
        logit="T·(s(e_w) − s(e_l)), s(x) = λx/(exp(λx) − 1)",
        about=' (`form = "paper"`: no default of beta)',
    ),
    "mapo_paper_power": Objective(
        terms=f"{_TERMS}:MAPO_PAPER_POWER",
        settings=_mapo(_PAPER_BETA, "ignored"),
        labels="optional",
        named={"name": "mapo", "form": "paper", "reading": "power"},
        loss="e_w + L(z)/β",
        logit="φ(e_w) − φ(e_l), φ(x) = (x/(exp x − 1))^β",
    ),
    "mapo_paper_scale": Objective(
        terms=f"{_TERMS}:MAPO_PAPER_SCALE",
        settings=_mapo(_PAPER_BETA, "ignored"),
        labels="optional",
        named={"name": "mapo", "form": "paper", "reading": "scale"},
        loss="e_w + L(z)/β",
        logit="φ(e_w) − φ(e_l), φ(x) = β·x/(exp x − 1)",
    ),
    "sft": Objective(
        terms=f"{_TERMS}:SFT",
        settings=_mapo(Setting(0.1, role="ignored"), "ignored"),
        loss="e_w",
        logit="e_l − e_w, only reported",
        about=": the chosen images alone, a control",
    ),
    "dpo": Objective(
        terms=f"{_TERMS}:DPO",
        settings=_DIFFUSION_DPO,
        reference=True,
        labels="optional",
        loss="L(z)",
        logit="u",
        about=" (Diffusion-DPO)",
    ),
    "smpo": Objective(
        terms=f"{_TERMS}:SMPO",
        settings=_DIFFUSION_DPO,
        reference=True,
        labels="required",
        loss="L(z)",
        logit="u·10(2p − 1)",
        about=', with soft labels: `"label": 0.8` in `pairs.jsonl`, or Pick-a-Pic\'s `label_0`',
    ),
    "ipo": Objective(
        terms=f"{_TERMS}:IPO",
        settings=_DIFFUSION_DPO,
        reference=True,
        loss="(z − 1/(2β))²",
        logit="m",
    ),
    "hinge": Objective(
        terms=f"{_TERMS}:HINGE",
        settings=_DIFFUSION_DPO,
        reference=True,
        loss="max(0, 1 − z)",
        logit="βm",
    ),
    "kto": Objective(
        terms=f"{_TERMS}:KTO",
        single=f"{_TERMS}:kto_single",
        settings={
            "beta": Setting(1000.0),
            "desirable_weight": Setting(1.0, symbol="v_w"),
            "undesirable_weight": Setting(1.0, symbol="v_l"),
        },
        reference=True,
        baseline=True,
        loss="½·(v_w·σ(−a) + v_l·σ(−b)), a = β(r_w − e_w − k), b = −β(r_l − e_l − k)",
        logit="βm, only reported",
        about=" (Diffusion-KTO): single images with a label instead of pairs",
    ),
    "dmpo": Objective(
        terms=f"{_TERMS}:DMPO",
        settings={"beta": Setting(6000.0), "alpha": Setting(0.01, high=1.0)},
        reference=True,
        loss="KL(Bern(σ(z)) ‖ Bern(1 − α))",
        logit="u",
    ),
    "linear_dpo": Objective(
        terms=f"{_TERMS}:LINEAR_DPO",
        settings={"beta": Setting(500.0), "eta": Setting(0.001, high=0.5)},
        reference=True,
        loss="c·(e_w − e_l), c = clamp(½ − z, η, 1 − η) held constant",
        logit="βm/5",
    ),
    "npo": Objective(
        terms=f"{_TERMS}:DPO",
        settings={"beta": Setting(2000.0)},  # as its authors released it
        reference=True,
        labels="optional",
        swapped=True,
        loss="L(z)",
        logit="−u",
        about=" (Diffusion-NPO): `dpo` with the halves exchanged, for the negative model of guidance",
    ),
    "orpo": Objective(
        terms=f"{_TERMS}:ORPO",
        settings={"beta": Setting(0.1)},
        labels="optional",
        loss="e_w + β·L(z)",
        logit="e_l − e_w",
    ),
    "simpo": Objective(
        terms=f"{_TERMS}:SIMPO",
        settings={"beta": _UNREFERENCED_BETA, "gamma": Setting(0.5, low=-math.inf)},
        labels="optional",
        loss="L(z)",
        logit="β(e_l − e_w) − γ",
    ),
    "cpo": Objective(
        terms=f"{_TERMS}:CPO",
        settings={"beta": _UNREFERENCED_BETA, "gamma": Setting(0.0, low=-math.inf)},
        labels="optional",
        loss="e_w + L(z)",
        logit="β(e_l − e_w) − γ",
    ),
}


# --- By the names that a config has for them ---


def objective_names() -> tuple[str, ...]:
    """Every name that `objective.name` may have."""
    return tuple(dict.fromkeys(known.named.get("name", key) for key, known in OBJECTIVES.items()))


def objective_key(name: str, **form: str) -> str:
    """The key in `OBJECTIVES` of what a config calls `name`, in its form and reading.

    Raises:
        KeyError: there is none.
    """
    stated = {"name": name, **form}
    for key, known in OBJECTIVES.items():
        if all(stated.get(what) == value for what, value in {"name": key, **known.named}.items()):
            return key
    raise KeyError(name)


def setting_names() -> tuple[str, ...]:
    """The names of all objectives' settings that a config may set."""
    return tuple(
        dict.fromkeys(
            name for known in OBJECTIVES.values() for name, s in known.settings.items() if s.role == "free"
        )
    )


# --- What computes, and objectives from outside ---


@functools.cache
def resolve(name: str) -> Any:
    """Import what a registry entry names as "module:NAME"; only installed code writes such entries."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TAKEN = ("name", "form", "reading", "reference")
"""Keys of a config's `[objective]` that are not settings of an objective."""
_OF_SCHEDULE = "num_train_timesteps"
"""The setting that comes from the noise schedule."""


def register_objective(name: str, objective: Objective) -> None:
    """Add an objective, so that `objective.name = "<name>"` trains with it and `paired_loss` takes it.

    Args:
        name: lower-case letters, digits and underscores.
        objective: what it is; its `named` stays empty.

    Raises:
        TypeError, ValueError: the name is taken, or the entry contradicts itself; nothing is registered.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective {name!r}: register an Objective, not {type(objective).__name__}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"objective {name!r}: a name is lower-case letters, digits and underscores")
    if name in OBJECTIVES or name in objective_names():
        raise ValueError(f"objective {name!r} is registered already: choose another name")
    if objective.named:
        raise ValueError(f"objective {name!r}: leave `named` out, a config says its name")
    for what, where in (("terms", objective.terms), ("single", objective.single)):
        if where is not None and not re.fullmatch(r"[\w.]+:\w+", where):
            raise ValueError(f"objective {name!r}: {what} = {where!r} is not written as 'module:NAME'")
    if objective.labels not in ("refused", "optional", "required"):
        raise ValueError(f"objective {name!r}: labels = {objective.labels!r} is unknown")
    if objective.baseline and not objective.single:
        raise ValueError(f"objective {name!r}: only terms of single samples have a baseline in the trainer")
    if objective.single and objective.labels != "refused":
        raise ValueError(f"objective {name!r}: single samples have no soft labels")
    if len(objective.settings) > MOST_SETTINGS:
        raise ValueError(f"objective {name!r}: the kernel takes {MOST_SETTINGS} settings at most")
    for key, setting in objective.settings.items():
        if not _NAME.fullmatch(key) or key in _TAKEN:
            raise ValueError(f"objective {name!r}: {key!r} cannot be the name of a setting")
        if setting.role not in ("free", "ignored") and (setting.role, key) != ("schedule", _OF_SCHEDULE):
            raise ValueError(f"objective {name!r}: the role {setting.role!r} of {key!r} is unknown")
        if not setting.low < setting.default < setting.high:
            raise ValueError(f"objective {name!r}: the default of {key!r} is not between low and high")
    OBJECTIVES[name] = objective
