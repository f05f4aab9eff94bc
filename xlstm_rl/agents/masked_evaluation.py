"""Stable-Baselines3's own evaluation with action masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents.masks import masks_actions, read_masks, takes_masks


class MaskedModel:
    """A model whose `predict` looks up the masks of the environment that it plays in.

    Pass it to code that calls `predict` without masks, such as Stable-Baselines3's `evaluate_policy`:
    `evaluate_policy(MaskedModel(model, env), env)`. Where the environment has no `action_masks`, or the model does not
    take them, it behaves as the model itself. Everything but `predict` is the model's.

    Args:
        model: with Stable-Baselines3's `predict`.
        env: the environment it will play in.

    Raises:
        ValueError: the model has use_masking=True and the environment no masks.
    """

    def __init__(self, model: Any, env: VecEnv) -> None:
        self._model, self._env = model, env
        wanted = getattr(model, "use_masking", None)
        self._masked = takes_masks(model) and masks_actions(env, env.action_space, wanted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
        """`predict` of the model with the masks of the present step."""
        if self._masked:
            kwargs["action_masks"] = read_masks(self._env, self._env.action_space)
        actions, state = self._model.predict(*args, **kwargs)
        return actions, state


class MaskedEvalCallback(EvalCallback):
    """Stable-Baselines3's `EvalCallback`, masks included; takes the same arguments.

    sb3-contrib's `MaskableEvalCallback` is for policies without memory: it does not carry their state.
    """

    def init_callback(self, model: BaseAlgorithm) -> None:
        """Called by `learn`."""
        super().init_callback(model)
        self.model = MaskedModel(model, self.eval_env)  # type: ignore[assignment]
