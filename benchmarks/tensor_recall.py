"""A task for many environments at once that gives tensors where it runs, as a simulator on a GPU does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

CUES = 4


class TensorRecall(VecEnv):
    """Say at the end of an episode which of four cues stood in its first observation.

    An observation holds the cue in the first step, a flag in the last, and noise. The reward is 1 for the right answer
    in the last step.

    Args:
        num_envs: environments.
        length: steps of an episode; that of the first differs from environment to environment.
        noise: further numbers in an observation.
        device: where everything is computed.
        arrays: give NumPy arrays in place of tensors.
        seed: of cues and noise.
    """

    def __init__(
        self,
        num_envs: int,
        length: int = 16,
        noise: int = 27,
        device: str | torch.device = "cpu",
        *,
        arrays: bool = False,
        seed: int = 0,
    ) -> None:
        self.length, self.noise, self.device, self.arrays = length, noise, torch.device(device), arrays
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.render_mode = None
        space = spaces.Box(-np.inf, np.inf, (CUES + 1 + noise,), np.float32)
        super().__init__(num_envs, space, spaces.Discrete(CUES))
        self.cues = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self.steps = torch.arange(num_envs, device=self.device) % length
        self.actions: Any = None

    def reset(self) -> Any:
        """New episodes everywhere, of different lengths."""
        self._draw(torch.ones_like(self.steps, dtype=torch.bool))
        self.steps = torch.arange(self.num_envs, device=self.device) % self.length
        return self._shown(first=torch.ones_like(self.steps, dtype=torch.bool))

    def step_async(self, actions: Any) -> None:
        """Keep the actions."""
        self.actions = torch.as_tensor(actions, device=self.device)

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        """All environments at once; those that end begin anew."""
        self.steps += 1
        dones = self.steps == self.length
        rewards = (dones & (self.actions == self.cues)).float()
        self.steps[dones] = 0
        self._draw(dones)
        return self._shown(first=dones), self._out(rewards), self._out(dones), [{} for _ in range(self.num_envs)]

    def _draw(self, where: Tensor) -> None:
        new = torch.randint(CUES, (self.num_envs,), generator=self.generator, device=self.device)
        self.cues = torch.where(where, new, self.cues)

    def _shown(self, first: Tensor) -> Any:
        cue = torch.nn.functional.one_hot(self.cues, CUES) * first[:, None]
        last = (self.steps == self.length - 1)[:, None]
        noise = torch.randn(self.num_envs, self.noise, generator=self.generator, device=self.device)
        return self._out(torch.cat([cue.float(), last.float(), noise], 1))

    def _out(self, values: Tensor) -> Any:
        return values.numpy(force=True) if self.arrays else values

    def close(self) -> None:
        """Nothing is open."""

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Of the next cues."""
        if seed is not None:
            self.generator.manual_seed(seed)
        return [seed] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same for every environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """For all environments."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """There are no single environments."""
        raise AttributeError(f"the environments have no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """In nothing."""
        return [False for _ in self._get_indices(indices)]
