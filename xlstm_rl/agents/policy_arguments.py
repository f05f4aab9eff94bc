"""Names in `policy_kwargs` are checked before Stable-Baselines3 hands them on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def check_policy_kwargs(policy_class: type[Any], policy_kwargs: Mapping[str, Any]) -> None:
    """Refuse what the policy does not know.

    Raises:
        TypeError: a name is unknown; the message lists it and the known ones.
    """
    known = _arguments_of(policy_class)
    unknown = [key for key in policy_kwargs if key not in known]
    if unknown:
        raise TypeError(
            f"policy_kwargs: {policy_class.__name__} takes no {unknown}; settings of the memory go into "
            "memory_kwargs=dict(...), and those of sb3-contrib's LSTM policies fit MlpLstmPolicy, CnnLstmPolicy "
            f"and MultiInputLstmPolicy alone; known are {sorted(known)}"
        )


def _arguments_of(policy_class: type[Any]) -> set[str]:
    """Names of the settings that the constructor takes, those that it hands on to its parents included."""
    names: set[str] = set()
    for kind in policy_class.__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        named = {part.name for part in parameters if part.kind not in (part.VAR_POSITIONAL, part.VAR_KEYWORD)}
        names |= named - {"self", "observation_space", "action_space", "lr_schedule"}
        if not any(part.kind is part.VAR_KEYWORD for part in parameters):
            break
    return names
