"""Environments in the processes of a Ray cluster, on this machine or on others, as one vector environment.

A message to a process and back takes 1 to 2 ms a step, so this is for environments that take many, or that need other
machines; docs/scaling.md compares. `pip install ray`, then `python examples/ray_vec_env.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import ray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv


class _Group:
    """A few environments in a process of their own."""

    def __init__(self, makers: list[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        self.env = DummyVecEnv(makers)

    def spaces(self) -> tuple[Any, Any]:
        return self.env.observation_space, self.env.action_space

    def reset(self, seeds: list[Any], options: list[Any]) -> tuple[Any, list[dict[str, Any]]]:
        self.env._seeds, self.env._options = seeds, options
        return self.env.reset(), self.env.reset_infos

    def step(self, actions: np.ndarray) -> Any:
        return self.env.step(actions)

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What a method of the vector environment of the group says."""
        return getattr(self.env, method)(*arguments, **named)


class RayVecEnv(VecEnv):
    """A vector environment of Stable-Baselines3 whose environments live in Ray actors.

    A lost process is an error at once, and nothing is restarted: episodes and their memory would not fit any more.

    Args:
        makers: each makes one environment, in the process where it will live.
        groups: processes; each steps its share of the environments one after the other.
        timeout: seconds for an answer; the first waits for cores too, where the cluster has none left.
        options: of the actors, such as `num_cpus` or `resources`.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], gymnasium.Env[Any, Any]]],
        groups: int,
        timeout: float = 300.0,
        **options: Any,
    ) -> None:
        if not 1 <= groups <= len(makers):
            raise ValueError(f"groups={groups} must be 1 to {len(makers)}, the number of environments")
        bounds = [len(makers) * group // groups for group in range(groups + 1)]
        self.parts = [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]
        remote = ray.remote(_Group).options(**{"num_cpus": 1, "max_restarts": 0, **options})
        self.actors = [remote.remote(list(makers[part.start : part.stop])) for part in self.parts]
        self.timeout = timeout
        self.pending: list[Any] = []
        self.render_mode = None
        super().__init__(len(makers), *self._answers([self.actors[0].spaces.remote()])[0])

    def reset(self) -> Any:
        """Reset all environments; gives the first observations."""
        asked = [
            actor.reset.remote([self._seeds[i] for i in part], [self._options[i] for i in part])
            for actor, part in zip(self.actors, self.parts, strict=True)
        ]
        answers = self._answers(asked)
        self.reset_infos = [info for _, infos in answers for info in infos]
        self._reset_seeds()
        self._reset_options()
        return _joined([obs for obs, _ in answers])

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions."""
        shares = zip(self.actors, self.parts, strict=True)
        self.pending = [actor.step.remote(actions[part.start : part.stop]) for actor, part in shares]

    def step_wait(self) -> Any:
        """Wait for all environments."""
        obs, rewards, dones, infos = zip(*self._answers(self.pending), strict=True)
        return _joined(obs), np.concatenate(rewards), np.concatenate(dones), [info for part in infos for info in part]

    def close(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of some environments."""
        return self._each("get_attr", indices, attr_name)

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute."""
        return all(self._answers([actor.ask.remote("has_attr", attr_name) for actor in self.actors]))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of some environments."""
        self._each("set_attr", indices, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of some environments."""
        return self._each("env_method", indices, method_name, *method_args, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> Any:
        """Whether some environments lie in a wrapper."""
        return self._each("env_is_wrapped", indices, wrapper_class)

    def get_images(self) -> list[Any]:
        """Pictures of all environments, where they draw any."""
        return self._each("env_method", None, "render")

    def _each(self, method: str, indices: Any, *arguments: Any, **named: Any) -> list[Any]:
        """Ask the groups of some environments, and give the answers in the order of the environments asked."""
        wanted = list(self._get_indices(indices))
        owners, asked = [], []
        for actor, part in zip(self.actors, self.parts, strict=True):
            own = [index for index in wanted if index in part]
            if own:
                owners.append(own)
                rows = [index - part.start for index in own]
                asked.append(actor.ask.remote(method, *arguments, indices=rows, **named))
        found: dict[int, Any] = {}
        for own, values in zip(owners, self._answers(asked), strict=True):
            found |= zip(own, values if values is not None else [None] * len(own), strict=True)
        return [found[index] for index in wanted]

    def _answers(self, asked: list[Any]) -> list[Any]:
        answers: list[Any] = ray.get(asked, timeout=self.timeout)
        return answers


def _joined(parts: Sequence[Any]) -> Any:
    """Observations of the groups as those of one vector environment."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def make_task() -> gymnasium.Env[Any, Any]:
    """Called in the processes, which import what they need."""
    return gymnasium.make("xlstm_rl:xlstm_rl/TMaze-v0")


def main() -> None:
    """Train for a while with eight environments in two processes."""
    from stable_baselines3.common.vec_env import VecMonitor

    from xlstm_rl import RecurrentPPO

    ray.init(log_to_driver=False)
    env = VecMonitor(RayVecEnv([make_task] * 8, groups=2, timeout=60.0))
    RecurrentPPO("MlpXLSTMPolicy", env, verbose=1).learn(10_000)
    env.close()


if __name__ == "__main__":
    main()
