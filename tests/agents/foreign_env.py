"""Batched simulators that are no vector environments of Stable-Baselines3, and their adapters."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper


class Engine:
    """Four copies with an interface of their own; every step writes into the same arrays."""

    num_envs = 4
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def __init__(self) -> None:
        self.time = 0
        self.shown = np.zeros((4, 2), np.float32)

    def reset(self) -> Any:
        self.time = 0
        self.shown[:] = 0
        return self.shown

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        self.time += 1
        self.shown[:] = (self.time % 5) / 5
        done = np.full(4, self.time % 5 == 0)
        infos = [{"terminal_observation": np.ones(2, np.float32)} if ended else {} for ended in done]
        return self.shown, np.ones(4, np.float32), done, infos

    def close(self) -> None:
        pass


class Adapter(VecEnvWrapper):
    """As those of SuperSuit and EnvPool: calls no constructor of its parents, and has what a step needs."""

    def __init__(self, venv: Any) -> None:
        self.venv, self.num_envs = venv, venv.num_envs
        self.observation_space, self.action_space = venv.observation_space, venv.action_space

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class Stub(VecEnv):
    """As those of GPU simulators: what is not needed raises, or is a stub that answers nothing.

    Args:
        refuse: called for everything optional.
        change: of what a step leads to.
    """

    def __init__(self, refuse: Callable[[str], Any], change: Callable[[tuple[Any, ...]], Any] = lambda answer: answer):
        self.engine, self.refuse, self.change = Engine(), refuse, change
        self.num_envs, self.render_mode = 4, None
        self.observation_space, self.action_space = Engine.observation_space, Engine.action_space

    def reset(self) -> Any:
        return self.engine.reset()

    def step_async(self, actions: Any) -> None:
        self.engine.step_async(actions)

    def step_wait(self) -> Any:
        return self.change(self.engine.step_wait())

    def close(self) -> None:
        self.engine.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        # which vector wrappers ask for
        return [self.render_mode] * 4 if attr_name == "render_mode" else self.refuse(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> Any:
        return self.refuse(attr_name)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> Any:
        return self.refuse(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return self.refuse("env_is_wrapped")

    def seed(self, seed: int | None = None) -> Any:
        return self.refuse("seed")

    def get_images(self) -> Any:
        return self.refuse("get_images")


def raises(kind: type[Exception]) -> Callable[[str], Any]:
    def refuse(name: str) -> Any:
        raise kind(f"{name} is not supported")

    return refuse


FOREIGN: dict[str, Callable[[], Any]] = {
    "adapter without its parents' constructor": lambda: Adapter(Engine()),
    "raises AttributeError": lambda: Stub(raises(AttributeError)),
    "raises NotImplementedError": lambda: Stub(raises(NotImplementedError)),
    "raises KeyError": lambda: Stub(lambda name: None if name in ("seed", "get_images") else raises(KeyError)(name)),
    "answers None": lambda: Stub(lambda name: None),
    "answers a list of None": lambda: Stub(lambda name: [None] * 4),
    "knows no environment": lambda: Stub(lambda name: []),
}
