"""From observations to features: which spaces are supported, in which form extractors see them, and which there are."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeGuard

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)

from xlstm_rl.vec_envs.env_contract import entries, map_obs

# Pixels of the sides of an image, below which nothing is left after the layers of `NatureCNN`.
SMALLEST_IMAGE = 36
OBSERVATIONS = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)
ACTIONS = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)


def check_spaces(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], name: str = "the environment"
) -> None:
    """Refuse spaces that no agent here can use.

    Args:
        observation_space: of the environment.
        action_space: of the environment.
        name: of the environment, for the message.

    Raises:
        ValueError: names the space and the remedy.
    """
    if isinstance(observation_space, spaces.Dict) and not observation_space.spaces:
        raise ValueError(f"{name} has observations without keys, {observation_space}: give the agent something to see")
    for key, part in entries(space_parts(observation_space)):
        what = "observations" if key is None else f"observations under the key {key!r}"
        if not isinstance(part, OBSERVATIONS):
            raise ValueError(
                f"{name} has {type(part).__name__} {what}; allowed are {_names(OBSERVATIONS)} and a flat Dict of "
                "these; wrap the environment in gymnasium.wrappers.FlattenObservation or TransformObservation"
            )
        if not np.prod(part.shape or (), dtype=int):
            raise ValueError(f"{name} has empty {what}, {part}: give the agent something to see, or leave that key out")
    remedy = "wrap the environment in gymnasium.wrappers.TransformAction"
    if not isinstance(action_space, ACTIONS):
        raise ValueError(f"{name} has {type(action_space).__name__} actions; allowed are {_names(ACTIONS)}; {remedy}")
    if isinstance(action_space, spaces.Box):
        if not np.isfinite([action_space.low, action_space.high]).all():
            raise ValueError(f"{name} has actions without bounds, {action_space}: {remedy}, with finite ones")
        if not action_space.low.size:
            raise ValueError(f"{name} has empty actions, {action_space}: {remedy}")
    elif len(action_space.shape or ()) > 1:
        raise ValueError(f"{name} has actions of several dimensions, {action_space}: {remedy}, with a flat space")


def _names(kinds: tuple[type, ...]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def space_parts(space: spaces.Space[Any]) -> Any:
    """A space, or the spaces of a Dict by key."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else space


def seen_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The space that a features extractor is made for: single numbers and grids of choices as rows."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: seen_space(part) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and not space.shape:
        return spaces.Box(space.low.reshape(1), space.high.reshape(1), dtype=space.dtype.type)
    if is_grid(space):
        return spaces.MultiDiscrete(space.nvec.ravel(), dtype=space.dtype.type, start=space.start.ravel())
    return space


def as_seen(obs: Any, space: spaces.Space[Any]) -> Any:
    """Observations [N, ...] of a space in the shape of its `seen_space`."""
    return map_obs(_as_row, obs, space_parts(space)) if isinstance(obs, dict) else _as_row(obs, space)


def _as_row(obs: Any, space: spaces.Space[Any]) -> Any:
    single = isinstance(space, spaces.Box) and not space.shape
    return obs.reshape(obs.shape[0], -1) if single or is_grid(space) else obs


def is_grid(space: spaces.Space[Any]) -> TypeGuard[spaces.MultiDiscrete]:
    """Whether a space is one of choices in several dimensions."""
    return isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1


def is_small_image(space: spaces.Space[Any], normalized_image: bool = False) -> bool:
    """Whether a space is one of images that `NatureCNN` cannot take; normalized ones are floats of any range."""
    if not is_image_space(space, normalized_image=normalized_image):
        return False
    height, width = space.shape[1:] if is_image_space_channels_first(space) else space.shape[:2]  # type: ignore[index, arg-type]
    return min(height, width) < SMALLEST_IMAGE


class FlatSmallImagesExtractor(CombinedExtractor):
    """A `CombinedExtractor` of Stable-Baselines3 that takes the pixels of images too small for `NatureCNN` as they are.

    Args:
        observation_space: a Dict.
        cnn_output_dim: features of each larger image.
        normalized_image: images are floats already.
    """

    def __init__(
        self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False
    ) -> None:
        flat = {
            key: spaces.Box(0, 1, (int(np.prod(part.shape or ())),)) if is_small_image(part, normalized_image) else part
            for key, part in observation_space.spaces.items()
        }
        super().__init__(spaces.Dict(flat), cnn_output_dim, normalized_image)


EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {
    "flatten": FlattenExtractor,
    "nature": NatureCNN,
    "combined": FlatSmallImagesExtractor,
}


def find_extractor(name: str) -> type[BaseFeaturesExtractor]:
    """A features extractor by its name: one of EXTRACTORS, or "module:Class" for one of yours, which is imported.

    Raises:
        ValueError: there is none of that name.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features extractor {name!r} cannot be imported: {error}") from error
    if not isinstance(kind, type) or not issubclass(kind, BaseFeaturesExtractor):
        raise ValueError(
            f"features extractor {name!r} must be {', '.join(EXTRACTORS)}, or module:Class with a class that derives "
            "from stable_baselines3.common.torch_layers.BaseFeaturesExtractor"
        )
    return kind


def check_extractor(kind: type[BaseFeaturesExtractor], space: spaces.Space[Any]) -> None:
    """Refuse an extractor of Stable-Baselines3 that cannot take observations of a space.

    Raises:
        ValueError: names both and the remedy.
    """
    if isinstance(space, spaces.Dict) and kind in (FlattenExtractor, NatureCNN):
        raise ValueError(
            "a Dict observation needs an extractor that takes it apart: use the policy MultiInputXLSTMPolicy "
            "(MultiInputLstmPolicy), or set features_extractor_class (policy.features_extractor=combined)"
        )
    if not isinstance(space, spaces.Dict) and issubclass(kind, CombinedExtractor):
        raise ValueError(
            f"{type(space).__name__} observations are no Dict, which CombinedExtractor takes apart: use the policy "
            "MlpXLSTMPolicy (MlpLstmPolicy), or CnnXLSTMPolicy (CnnLstmPolicy) for images"
        )
    small = kind in (NatureCNN, CombinedExtractor) and any(
        is_small_image(part) for _, part in entries(space_parts(space))
    )
    if small:
        other = (
            "FlatSmallImagesExtractor" if isinstance(space, spaces.Dict) else "MlpXLSTMPolicy, which takes them flat,"
        )
        raise ValueError(
            f"images of {space} are too small for NatureCNN, which needs {SMALLEST_IMAGE} x {SMALLEST_IMAGE}: use "
            f"{other} or a features_extractor_class of yours (policy.features_extractor=flatten, combined or "
            "module:Class)"
        )
