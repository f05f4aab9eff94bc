"""Writing a policy as an ONNX file, with everything a runner needs to know in its metadata."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from xlstm_rl._version import __version__
from xlstm_rl.agents.actor_critic import MemoryActorCritic, evaluating
from xlstm_rl.agents.checkpoint import KIND, describe, write_whole
from xlstm_rl.agents.heads import mask_parts, masks_actions
from xlstm_rl.export.preprocessing import Front, Normalize, entries, front_of, without
from xlstm_rl.export.step_graph import MASK, NEXT, RESET, PolicyStep, distribution_parameters, observation_name
from xlstm_rl.vec_envs.inputs import KEYS

# The entry of the ONNX metadata that holds the JSON.
METADATA = "xlstm_rl"
INSTALL = "pip install 'xlstm-rl[export]' (in a checkout '.[export]')"
_ROWS = 3


class ExportError(ValueError):
    """A policy cannot be exported here; the message says why and names the remedy."""


def export_onnx(model: BaseAlgorithm, path: Path | str, *, action_masks: bool | None = None) -> dict[str, Any]:
    """Write one step of an agent as an ONNX file: observation, state and reset flag in, action and next state out.

    What the critic alone sees (`critic_keys`) is no input, and the value of such an agent no output.

    The graph includes the normalisation and the transposition of images done by the vector environment of the agent
    (`VecNormalize` with its present statistics, `VecTransposeImage`); every axis of the batch is dynamic; the file is
    written whole or not at all.

    Args:
        model: an agent with an `XLSTMPolicy`.
        path: of the file; missing folders are created.
        action_masks: whether masks are an input; None: where the environment of the agent has masks that it uses.

    Returns:
        The metadata, which is the JSON under the key "xlstm_rl" in the file; docs/export.md says what is in it.

    Raises:
        ExportError: a package is missing, or the agent has no memory policy.
        ValueError: actions of this kind cannot be masked.
    """
    require("onnx", "onnxscript")
    policy = memory_policy(model)
    front = without(front_of(model.get_env(), policy.observation_space), policy.unseen_keys)
    step = PolicyStep(policy, front, masked=masks_wanted(model, action_masks))
    metadata = describe_step(step, front)
    content = _trace(step, front, metadata)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return metadata


def memory_policy(model: BaseAlgorithm) -> MemoryActorCritic:
    """The policy of an agent.

    Raises:
        ExportError: it has no memory core.
    """
    if not isinstance(model.policy, MemoryActorCritic):
        raise ExportError(
            f"policy {type(model.policy).__name__} has no memory core: export an agent with an XLSTMPolicy"
        )
    return model.policy


def masks_wanted(model: BaseAlgorithm, action_masks: bool | None) -> bool:
    """Whether the exported policy takes masks; arguments and errors as for `export_onnx`."""
    env = model.get_env()
    if action_masks is None:
        # sb3-contrib's own RecurrentPPO knows no masks
        return env is not None and masks_actions(env, model.action_space, getattr(model, "use_masking", False))
    if action_masks:
        mask_parts(model.action_space)
    return action_masks


def require(*packages: str) -> None:
    """Refuse to go on without the optional packages.

    Raises:
        ExportError: names those that are missing and how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs the package {' and '.join(missing)}: {INSTALL}")


def _trace(step: PolicyStep, front: Front, metadata: dict[str, Any]) -> bytes:
    """The content of the ONNX file."""
    examples = example_inputs(step, front)
    with evaluating(step.policy), quiet_exporter():
        step.eval()
        rows = tuple({0: torch.export.Dim.DYNAMIC} for _ in examples)
        program = torch.onnx.export(
            step,
            examples,
            input_names=step.inputs,
            output_names=step.outputs,
            dynamic_shapes=(rows,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "without a path the exporter returns the program"
    _free_names(program, {*step.inputs, *step.outputs})
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"
    model.producer_name, model.producer_version = "xlstm_rl", __version__
    model.metadata_props.add(key=METADATA, value=json.dumps(metadata))
    content: bytes = model.SerializeToString()
    return content


def _free_names(program: torch.onnx.ONNXProgram, taken: set[str]) -> None:
    """Rename what has the name of an input or output inside the graph; the exporter does not look."""
    for node in program.model.graph:
        for value in node.outputs:
            if value.name in taken and not value.is_graph_output():
                value.name = f"inner.{value.name}"


def example_inputs(step: PolicyStep, front: Front) -> tuple[torch.Tensor, ...]:
    """What a step may be given, in the order of its inputs; of three rows, as an axis of 1 is taken for a constant."""
    device = step.policy.device
    # a copy: drawing moves the generator of a space
    samples = {observation_name(key): space for key, space in entries(copy.deepcopy(front.space)).items()}
    examples = {
        name: torch.from_numpy(np.stack([np.asarray(space.sample(), space.dtype) for _ in range(_ROWS)]))
        for name, space in samples.items()
    }
    examples[RESET] = torch.zeros(_ROWS, dtype=torch.bool)
    if step.masked:
        examples[MASK] = torch.ones(_ROWS, sum(mask_parts(step.policy.action_space)), dtype=torch.bool)
    for name, leaf in step.state_leaves.items():
        examples[name] = leaf.new_zeros(_ROWS, *leaf.shape[1:])
    return tuple(examples[name].to(device) for name in step.inputs)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what the exporter says about its own insides and about packages that no policy needs."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def describe_step(step: PolicyStep, front: Front) -> dict[str, Any]:
    """What a runner needs to know, as JSON; see docs/export.md."""
    policy, parts = step.policy, entries(front.space)
    observations = {
        observation_name(key): {
            "shape": list(space.shape or ()),
            "dtype": np.dtype(space.dtype).name,
            "space": _space(space),
            "normalized": any(isinstance(layer, Normalize) for layer in front.layers[key]),
        }
        for key, space in parts.items()
    }
    return {
        "xlstm_rl": __version__,
        "inputs": {
            "observations": observations,
            "reset": RESET,
            "action_mask": {"name": MASK, "parts": mask_parts(policy.action_space)} if step.masked else None,
        },
        "state": {
            name: {"next": NEXT + name, "shape": list(leaf.shape[1:]), "dtype": _dtype(leaf)}
            for name, leaf in step.state_leaves.items()
        },
        "memory_inputs": {name: observation_name(key) for name, key in KEYS.items() if key in parts},
        "wrappers_outside": front.outside,
        "action": _describe_action(policy),
        "value": "value" if "value" in step.outputs else None,
        "memory": policy.memory,
    }


def _describe_action(policy: MemoryActorCritic) -> dict[str, Any]:
    space = policy.action_space
    kinds = {"Discrete": "categorical", "MultiDiscrete": "categoricals", "MultiBinary": "bernoulli", "Box": "gaussian"}
    facts = {
        "name": "action",
        "space": _space(space),
        "distribution": kinds[type(space).__name__],
        "parameters": distribution_parameters(policy),
    }
    if isinstance(space, spaces.Box):
        facts["to_bounds"] = "tanh" if policy.squash_output else "clip"
    return facts


def _space(space: spaces.Space[Any]) -> dict[str, Any]:
    described = describe(space, "space", {})
    return {"kind": described.pop(KIND), **described}


def _dtype(leaf: torch.Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")
