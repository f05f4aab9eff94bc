"""Many copies of a task, played in step with numpy: what all such batches share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from xlstm_rl.envs.chance import Chance, Symbols
from xlstm_rl.envs.parameters import whole_number
from xlstm_rl.envs.task_facts import TaskFacts

Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]
Observations = NDArray[np.float32]
Results = tuple[Observations, NDArray[np.float64], Flags, Flags, dict[str, Any]]
Task = TypeVar("Task", bound=gym.Env[Any, Any])


class Outcome(NamedTuple):
    """What a step of N environments led to; all [N], and zero in rows that did not take part."""

    reward: NDArray[np.float64]
    terminated: Flags
    truncated: Flags
    success: Flags


class TaskVectorEnv(gym.vector.VectorEnv[Observations, Symbols, NDArray[Any]], Generic[Task]):
    """N environments of one task in one process, equal bit for bit to gymnasium's `SyncVectorEnv` of the same.

    Each environment draws its episodes from a random generator of its own: with seed s, environment i meets the
    episodes of a single environment with seed s + i. Autoreset, `reset_mask` and infos are those of `SyncVectorEnv`.
    """

    metadata: dict[str, Any] = {}

    def __init__(self, single: Task, num_envs: int, autoreset_mode: AutoresetMode | str) -> None:
        """Prepare the spaces.

        Args:
            single: An environment of the task; the batch takes its parameters and spaces, and draws its pictures.
            num_envs: N, at least 1.
            autoreset_mode: When an environment whose episode ended is reset; also as text, e.g. "SameStep".
        """
        self.num_envs = whole_number("num_envs", num_envs, at_least=1)
        self.single = single
        self._mode = AutoresetMode(autoreset_mode)
        self.metadata = {**single.metadata, "autoreset_mode": self._mode}
        self.render_mode = single.render_mode
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, self.num_envs)
        self.action_space = batch_space(single.action_space, self.num_envs)
        self.facts: TaskFacts = single.facts  # type: ignore[attr-defined]
        self.rows = np.arange(self.num_envs)
        self._num_actions = int(single.action_space.n)  # type: ignore[attr-defined]
        self._generators: list[np.random.Generator | None] = [None] * self.num_envs
        self._seeds: list[int] = [-1] * self.num_envs
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._started = False

    @abstractmethod
    def start(self, rows: Rows, chance: Chance) -> None:
        """Start new episodes in `rows`, drawn with `chance`, which has one generator for each."""

    @abstractmethod
    def advance(self, actions: Symbols, active: Flags) -> Outcome:
        """Step the rows that are `active`, [N]; the others stay as they are. Returns new arrays."""

    @abstractmethod
    def observe(self) -> Observations:
        """A new array of what all rows show, [N, size]."""

    @abstractmethod
    def single_at(self, row: int) -> Task:
        """The single environment, brought to the state of `row`."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start episodes.

        Args:
            seed: Of the first environment, the others have the numbers after it; or one for each, None to go on.
            options: `reset_mask`, [N] bool, says which environments to reset; None for all.

        Raises:
            TypeError, ValueError: The number of seeds or the mask does not fit.
            gymnasium.error.ResetNeeded: The first reset is not one of all environments.
        """
        seeds = self._seed_list(seed)
        mask = np.ones(self.num_envs, np.bool_) if options is None else self._mask(options)
        if not (self._started or mask.all()):
            raise gym.error.ResetNeeded(f"the first reset must be one of all {self.num_envs} environments, got {mask}")
        rows = np.flatnonzero(mask)
        for row in rows:
            if seeds[row] is not None:
                self._generators[row], self._seeds[row] = gym.utils.seeding.np_random(seeds[row])
        self._restart(rows)
        self._started = True
        self._ended &= ~mask
        return self.observe(), {}

    def step(self, actions: Any) -> Results:
        """Step all environments; those that wait for a reset are reset instead, if the autoreset mode says so.

        Raises:
            ValueError: An action is not one of the task's.
            gymnasium.error.ResetNeeded: An episode is over or was never started, and there is no autoreset for it.
        """
        chosen = self._checked(actions)
        waiting = self._ended
        if waiting.any():
            if self._mode is AutoresetMode.DISABLED:
                raise gym.error.ResetNeeded(f"episodes {np.flatnonzero(waiting)} are over; reset them by reset_mask")
            self._restart(np.flatnonzero(waiting))
        reward, terminated, truncated, success = self.advance(chosen, ~waiting)
        seen = self.observe()
        ended = terminated | truncated
        if not ended.any():
            self._ended = ended
            return seen, reward, terminated, truncated, {}
        infos: dict[str, Any] = {"is_success": success & ended, "_is_success": ended.copy()}
        if self._mode is AutoresetMode.SAME_STEP:
            last = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(ended):
                last[row] = seen[row]
            infos = {"final_obs": last, "_final_obs": ended.copy(), "final_info": infos, "_final_info": ended.copy()}
            self._restart(np.flatnonzero(ended))
            return self.observe(), reward, terminated, truncated, infos
        self._ended = ended
        return seen, reward, terminated, truncated, infos

    def oracle_actions(self) -> Symbols:
        """What the oracle of each environment does now, [N]."""
        actions = [self.single_at(row).oracle_action() for row in range(self.num_envs)]  # type: ignore[attr-defined]
        return np.array(actions, np.int64)

    def render(self) -> tuple[Any, ...]:
        """What each environment shows by `render`."""
        return tuple(self.single_at(row).render() for row in range(self.num_envs))

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random generator of each environment."""
        return tuple(self._generator(row) for row in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The last seed of each environment."""
        return tuple(self._seeds)

    def _restart(self, rows: Rows) -> None:
        self.start(rows, Chance([self._generator(row) for row in rows.tolist()]))

    def _generator(self, row: int) -> np.random.Generator:
        generator = self._generators[row]
        if generator is None:
            generator, self._seeds[row] = gym.utils.seeding.np_random()
            self._generators[row] = generator
        return generator

    def _seed_list(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + row for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must have an entry for each of {self.num_envs} environments, got {len(seed)}")
        return [None if one is None else int(one) for one in seed]

    def _mask(self, options: dict[str, Any]) -> Flags:
        mask = options.get("reset_mask")
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"options['reset_mask'] must be an array of bool, got {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must be [{self.num_envs}] with a True in it, got {mask!r}")
        return mask

    def _checked(self, actions: Any) -> Symbols:
        if not self._started:
            raise gym.error.ResetNeeded("no episode was ever started; call reset()")
        chosen = np.asarray(actions)
        if chosen.shape != (self.num_envs,) or chosen.dtype.kind not in "iu":
            raise ValueError(f"actions must be {self.num_envs} whole numbers, got {chosen.dtype} {chosen.shape}")
        # As unsigned numbers, negative ones are too large.
        if (chosen.astype(np.uint64) >= self._num_actions).any():
            raise ValueError(f"actions must be in 0..{self._num_actions - 1}, got {chosen}")
        return chosen.astype(np.int64, copy=False)
