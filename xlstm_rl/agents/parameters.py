"""Parameters of an agent from a file: weights and optimisers that fit, checked as they will be used."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_rl.agents.checkpoint import CheckpointError, class_name, named_class

OPTIMIZER = "policy.optimizer"
_WITHOUT = "; load(path, custom_objects={'policy.optimizer': None}) takes the weights alone"
# Optimiser state that does not have the shape of its weight.
_OTHER_SHAPES = ("step", "row_var", "col_var", "mu_product", "eta", "mu")
# Sums and means of squares, and lengths: a root is taken of them, or they are divided by.
_NOT_NEGATIVE = (
    *("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "step_size"),
    *("variance", "row_var", "col_var"),
)


class MisfitError(ValueError):
    """The state of an optimiser is sound, but of other weights or of another class than the optimiser here."""


def frozen_names(policy: torch.nn.Module) -> list[str]:
    """Names of the weights that are not trained."""
    return [name for name, weight in policy.named_parameters() if not weight.requires_grad]


def freeze(policy: torch.nn.Module, frozen: Any, file: str) -> None:
    """Let train all weights but those named; None, of files of format 1, leaves them as they are.

    Raises:
        CheckpointError: these are no names of weights.
    """
    if frozen is None:
        return
    weights = dict(policy.named_parameters())
    if not isinstance(frozen, list) or not _are_texts(frozen) or not weights.keys() >= set(frozen):
        raise CheckpointError(f"{file}: frozen_parameters are {frozen!r:.200}, which are no weights of the policy")
    for name, weight in weights.items():
        weight.requires_grad_(name not in frozen)


def set_weights(module: torch.nn.Module, weights: Any, name: str, file: str) -> None:
    """Load a state dict, in the dtype that it has.

    Args:
        module: takes the weights.
        weights: state dict.
        name: of the part of the file, for errors.
        file: its name, for errors.

    Raises:
        CheckpointError: names, shapes or kinds do not fit, or numbers are none.
    """
    check_numbers(weights, name, file)
    expected = module.state_dict()
    if set(expected) != set(weights):
        raise CheckpointError(
            f"{file}: the weights do not fit {type(module).__name__} as its settings build it: "
            f"missing {sorted(set(expected) - set(weights))}, unknown {sorted(set(weights) - set(expected))}; where "
            "layers were changed after the agent was made, make it, change them likewise and call set_parameters(path)"
        )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    dtypes = {weights[name].dtype for name in parameters if isinstance(weights[name], Tensor)}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        # as after policy.double()
        module.to(dtype)
        expected = module.state_dict()
    for name, wanted in expected.items():
        weight = weights[name]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(weight, Tensor) or weight.shape != wanted.shape:
            found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise CheckpointError(f"{file}: weight {name!r} is {found}, its settings need {list(wanted.shape)}")
        if weight.is_floating_point() != wanted.is_floating_point() or weight.is_complex():
            raise CheckpointError(f"{file}: weight {name!r} is {weight.dtype}, its settings need {wanted.dtype}")
        # as used: a float64 may be too large for a float32
        lost = weight.isfinite() & ~weight.to(wanted.dtype).isfinite()
        if bool(lost.any()) or (name in parameters and not bool(weight.isfinite().all())):
            raise CheckpointError(f"{file}: weight {name!r} is infinite; use an earlier checkpoint")
    _check_shared(module, weights, file)
    module.load_state_dict(weights)


def _check_shared(module: torch.nn.Module, weights: Mapping[str, Any], file: str) -> None:
    """Weights that are one in the file must be one here, or training would make them two."""
    here, first = module.state_dict(), {id(weight): name for name, weight in reversed(list(weights.items()))}
    for name, weight in weights.items():
        other = first[id(weight)]
        if isinstance(weight, Tensor) and weight.numel() and here[name].data_ptr() != here[other].data_ptr():
            raise CheckpointError(
                f"{file}: weights {other!r} and {name!r} are one, and two in {type(module).__name__} as its settings "
                "build it: make the agent, tie them likewise and call set_parameters(path)"
            )


def check_numbers(group: Any, name: str, file: str) -> None:
    """Refuse what is no state dict or holds NaN.

    Raises:
        CheckpointError: names the entry.
    """
    if not isinstance(group, dict):
        raise CheckpointError(f"{file}: {name}.json describes no state dict")
    for path, tensor in _named_tensors(group, ""):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CheckpointError(f"{file}: {name} has NaN in {path!r}; use an earlier checkpoint")


def _named_tensors(tree: Any, path: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from _named_tensors(part, f"{path}.{key}" if path else str(key))


def name_weights(policy: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the policy's optimiser with its class and the names of its weights, group by group."""
    names = {id(weight): name for name, weight in policy.named_parameters()}
    groups = [
        {**told, "param_names": [names.get(id(weight), "") for weight in group["params"]]}
        for told, group in zip(kept["param_groups"], policy.optimizer.param_groups, strict=True)
    ]
    return {**kept, "param_groups": groups, "class": class_name(type(policy.optimizer))}


def fit_optimizer(policy: Any, group: Any, file: str, order: list[str] | None = None) -> dict[str, Any]:
    """A state dict for the policy's optimiser, which is made anew where that of the file has other groups or a class.

    Args:
        policy: whose `optimizer` it is for.
        group: state dict, with names and class as `name_weights` adds them or without.
        file: for errors.
        order: names of the weights of a single group that has no names of its own.

    Raises:
        MisfitError: it is of other weights, or of a class that is not known here.
        CheckpointError: it is damaged.
    """
    check_numbers(group, OPTIMIZER, file)
    state, groups = group.get("state"), group.get("param_groups")
    if (
        not isinstance(state, dict)
        or not isinstance(groups, list)
        or not all(isinstance(part, dict) and isinstance(part.get("params"), list) for part in groups)
    ):
        raise CheckpointError(f"{file}: the optimiser state lacks 'state' or 'param_groups'{_WITHOUT}")
    groups = [dict(part) for part in groups]
    names = [part.pop("param_names", None) for part in groups]
    weights = dict(policy.named_parameters())
    if order is not None and len(groups) == 1:
        # a state dict names shared weights several times
        names = [[name for name in order if name in weights]]
    if all(isinstance(part, list) for part in names):
        flat = [name for part in names for name in part]
        if [len(part) for part in names] != [len(part["params"]) for part in groups] or not _are_texts(
            [*flat, group.get("class", "")]
        ):
            raise CheckpointError(f"{file}: the optimiser state has another number of weights than names{_WITHOUT}")
        unknown = [name for name in flat if name not in weights]
        if unknown:
            raise MisfitError(f"it is of weights that the policy does not have, {unknown!r:.200}")
        _form_groups(policy, [[weights[name] for name in part] for part in names], groups, group.get("class"), file)
    formed = [part["params"] for part in policy.optimizer.param_groups]
    if [len(part) for part in formed] != [len(part["params"]) for part in groups]:
        raise MisfitError(
            f"it is of groups of {[len(part['params']) for part in groups]} weights, the optimiser here of "
            f"{[len(part) for part in formed]}"
        )
    _check_optimizer(policy.optimizer, groups, state, file)
    return {"state": state, "param_groups": groups}


def _form_groups(policy: Any, weights: list[list[Tensor]], groups: list[dict[str, Any]], kind: Any, file: str) -> None:
    """Make the policy's optimiser anew if it is of another class, or of other groups, than those of a file."""
    built = policy.optimizer
    same_class = kind in (None, class_name(type(built)))
    here = [[id(weight) for weight in part["params"]] for part in built.param_groups]
    if same_class and here == [[id(weight) for weight in part] for part in weights]:
        return
    make = type(built) if same_class else named_class(kind)
    if make is None or not issubclass(make, torch.optim.Optimizer):
        raise MisfitError(f"it is of the class {kind!r:.200}, the optimiser here of {class_name(type(built))}")
    formed: Any = [{**part, "params": params} for part, params in zip(groups, weights, strict=True)]
    try:
        policy.optimizer = make(formed)  # type: ignore[call-arg]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no {kind} can be made of the groups in it: {error}{_WITHOUT}") from error


def _check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any, file: str) -> None:
    """What `load_state_dict` does not check itself, after the conversion that it does."""
    for path, tensor in _named_tensors(state, "state"):
        if tensor.is_floating_point() and bool(tensor.isinf().any()):
            raise CheckpointError(f"{file}: {OPTIMIZER} has infinity in {path!r}{_WITHOUT}")
    if not class_name(type(optimizer)).startswith(("torch.", "stable_baselines3.")):
        # what else is right, only its own class knows
        return
    weights = [weight for part in optimizer.param_groups for weight in part["params"]]
    flat = [index for part in groups for index in part["params"]]
    known = inspect.signature(type(optimizer).__init__).parameters
    for part in groups:
        settings = {key: value for key, value in part.items() if key in known and key != "params"}
        try:
            if not all(np.isfinite(number) for number in _numbers(settings)):
                raise ValueError(f"a setting is not finite: {settings}")
            # the constructor checks them
            type(optimizer)([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the optimiser state has impossible settings: {error}{_WITHOUT}") from error
    for index, kept in state.items():
        if index not in flat or not isinstance(kept, dict):
            raise CheckpointError(f"{file}: the optimiser state names weight {index!r:.50}, which there is not")
        weight = weights[flat.index(index)]
        for name, value in kept.items():
            wrong = _wrong_state(name, value, weight)
            if wrong:
                raise CheckpointError(f"{file}: optimiser state {name!r:.50} of weight {index} {wrong}{_WITHOUT}")


def _wrong_state(name: Any, value: Any, weight: Tensor) -> str | None:
    """What is wrong with an entry of an optimiser's state; None if nothing is."""
    if value is None and name == "momentum_buffer":
        # before the first step
        return None
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float):
            return f"is {value!r:.50}, no number"
        value = torch.tensor(float(value))
    elif value.shape != weight.shape and name not in _OTHER_SHAPES:
        return f"is {list(value.shape)}, not {list(weight.shape)}"
    elif not value.is_floating_point() and value.ndim:
        return f"is {value.dtype}, not {weight.dtype}"
    if name != "step" and value.is_floating_point():
        value = value.to(weight.dtype)
    if not bool(value.isfinite().all()):
        return "is not finite"
    if name in _NOT_NEGATIVE and bool((value < 0).any()):
        return "is negative"
    return None


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _numbers(tree: Any) -> Iterable[float]:
    if isinstance(tree, int | float):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(part)
