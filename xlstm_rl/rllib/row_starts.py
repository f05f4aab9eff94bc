"""Connectors of RLlib that keep memory states where rows of a batch start, in place of one for every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from ray.rllib.connectors.common import (
    AddObservationsFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
)
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import AddColumnsFromEpisodesToTrainBatch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

State = dict[str, np.ndarray]
Config = TypeVar("Config")

# Of an episode's `custom_data`, which travels with it and goes on in its next part.
_NOW, _ROWS = "xlstm_rl_state", "xlstm_rl_states_at_row_starts"


def keep_states_at_row_starts(config: Config) -> Config:
    """Let env runners keep and send memory states only for the starts of rows, which training begins from.

    By itself RLlib keeps the state of every step in the episodes and sends all of them from env runners to learners:
    18 kB a step for an xLSTM of 64 units, of which training reads one in `max_seq_len`.

    Args:
        config: an AlgorithmConfig; connectors that it has already come first, those set later replace these.

    Returns:
        The same config.

    Raises:
        ValueError: the config is one of several agents.
    """
    settings: Any = config
    if settings.is_multi_agent:
        raise ValueError("keep_states_at_row_starts is for one agent: leave it out, and RLlib keeps every state")
    settings.env_runners(
        env_to_module_connector=partial(_to_module, settings._env_to_module_connector),
        module_to_env_connector=partial(_to_env, settings._module_to_env_connector),
    )
    settings.training(learner_connector=partial(_to_learner, settings._learner_connector))
    return config


def _to_module(earlier: Callable[..., Any] | None, env: Any, spaces: Any, device: Any) -> list[ConnectorV2]:
    # RLlib's own pieces after these find their work done
    ours = [AddObservationsFromEpisodesToBatch(), AddTimeDimToBatchAndZeroPad(), StateNow()]
    return [*_pieces(earlier, env, spaces, device), *ours]


def _to_env(earlier: Callable[..., Any] | None, env: Any, spaces: Any) -> list[ConnectorV2]:
    return [*_pieces(earlier, env, spaces), KeepState()]


def _to_learner(earlier: Callable[..., Any] | None, observation_space: Any, action_space: Any) -> list[ConnectorV2]:
    ours = [
        AddObservationsFromEpisodesToBatch(as_learner_connector=True),
        AddColumnsFromEpisodesToTrainBatch(),
        AddTimeDimToBatchAndZeroPad(as_learner_connector=True),
        StatesAtRowStarts(),
    ]
    return [*_pieces(earlier, observation_space, action_space), *ours]


def _pieces(earlier: Callable[..., Any] | None, *arguments: Any) -> list[ConnectorV2]:
    made = [] if earlier is None else earlier(*arguments)
    return [made] if isinstance(made, ConnectorV2) else list(made)


class StateNow(ConnectorV2):
    """Env to module: the state that the last step left, or the empty one."""

    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        """Add STATE_IN, an item for every episode."""
        if rl_module is None or not rl_module.is_stateful():
            return batch
        for episode in self.single_agent_episode_iterator(episodes):
            if episode.is_done:
                # what the module says here is dropped, and nobody goes on from there
                episode.custom_data.pop(_NOW, None)
            self.add_batch_item(batch, Columns.STATE_IN, _filled(episode.custom_data.get(_NOW), rl_module), episode)
        return batch


class KeepState(ConnectorV2):
    """Module to env: states go on in the episodes, those at the starts of rows stay in them."""

    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        """Take STATE_OUT out of the batch."""
        states: Mapping[Any, list[State]] = batch.pop(Columns.STATE_OUT, {})
        for episode in episodes:
            after = states.get((episode.id_,))
            # where an episode has just ended, the next one is not in the batch yet
            if after is None or not episode.is_reset:
                continue
            kept = episode.custom_data
            if len(episode) == 0:
                kept[_ROWS] = [kept.get(_NOW)]
            # not a view, which would keep the states of all environments
            kept[_NOW] = {name: np.array(part) for name, part in after[0].items()}
            if (len(episode) + 1) % rl_module.model_config["max_seq_len"] == 0:
                kept[_ROWS].append(kept[_NOW])
        return batch


class StatesAtRowStarts(ConnectorV2):
    """Learner: the states that the env runners kept."""

    def __call__(self, *, rl_module: Any, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        """Add STATE_IN, an item for every row."""
        module = rl_module[DEFAULT_MODULE_ID] if isinstance(rl_module, MultiRLModule) else rl_module
        if not module.is_stateful():
            return batch
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            rows = math.ceil(len(episode) / module.model_config["max_seq_len"])
            kept = episode.custom_data.get(_ROWS, [])[:rows]
            if len(kept) < rows:
                raise ValueError(
                    f"an episode of {len(episode)} steps holds the states of {len(kept)} of its {rows} rows: it was "
                    "not collected under keep_states_at_row_starts; leave that out to train from it"
                )
            states = [_filled(state, module) for state in kept]
            self.add_n_batch_items(batch, Columns.STATE_IN, states, rows, episode)
        return batch


def _filled(state: State | None, module: Any) -> State:
    """None stands for the empty memory in episodes, which are sent."""
    return module.get_initial_state() if state is None else state
