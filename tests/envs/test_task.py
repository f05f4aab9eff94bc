"""What tasks test and how they are made longer."""

from __future__ import annotations

import gymnasium
import pytest

from xlstm_rl.envs import ABILITIES, TaskPurpose, longer, suite_ids, task_facts, task_purpose
from xlstm_rl.envs.task import PURPOSES

WITH_LENGTH = [env_id for env_id, purpose in PURPOSES.items() if purpose.length is not None]


def test_every_task_of_the_package_has_an_ability() -> None:
    ours = {env_id for env_id in gymnasium.registry if env_id.startswith("xlstm_rl/")} - {*suite_ids()}
    assert set(PURPOSES) == ours
    assert {purpose.ability for purpose in PURPOSES.values()} == {*ABILITIES} - {"other"}


def test_task_of_somebody_else_has_no_ability_of_the_suite() -> None:
    assert task_purpose("CartPole-v1") == TaskPurpose("other")


def test_module_before_the_id_does_not_matter() -> None:
    assert task_purpose("xlstm_rl:xlstm_rl/Parity-v0") == task_purpose("xlstm_rl/Parity-v0")


@pytest.mark.parametrize("env_id", WITH_LENGTH)
def test_longer_task_has_longer_episodes_and_the_same_spaces(env_id: str) -> None:
    purpose = task_purpose(env_id)
    assert purpose.length is not None
    kwargs = longer(env_id, {}, purpose.length, 4, odd=purpose.odd)
    short, long = gymnasium.make(env_id), gymnasium.make(env_id, **kwargs)
    before, after = task_facts(short), task_facts(long)
    assert before is not None and after is not None
    assert before.horizon * 2 < after.horizon <= before.horizon * 4
    assert short.observation_space == long.observation_space
    assert short.action_space == long.action_space


def test_length_given_is_the_one_that_is_multiplied() -> None:
    kwargs = {"corridor_length": 7, "render_mode": None}
    expected = {"corridor_length": 28, "render_mode": None}
    assert longer("xlstm_rl/TMaze-v0", kwargs, "corridor_length", 4) == expected


def test_odd_length_stays_odd() -> None:
    assert longer("x", {"n": 21}, "n", 4, odd=True) == {"n": 83}


def test_parameter_that_a_task_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no parameter 'size'; known: length"):
        longer("xlstm_rl/Parity-v0", {}, "size", 4)


def test_parameter_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="render_mode=None"):
        longer("xlstm_rl/Parity-v0", {}, "render_mode", 4)
