"""Gymnasium ids of the tasks."""

import gymnasium as gym

from xlstm_rl.envs.hide_velocity import HideVelocity

TASKS = {
    "TMaze": "xlstm_rl.envs.t_maze:TMaze",
    "RepeatFirst": "xlstm_rl.envs.repeat_first:RepeatFirst",
    "RepeatPrevious": "xlstm_rl.envs.repeat_previous:RepeatPrevious",
    "Parity": "xlstm_rl.envs.parity:Parity",
    "KeyValueRecall": "xlstm_rl.envs.key_value_recall:KeyValueRecall",
    "CueRecall": "xlstm_rl.envs.repeat_first:cue_recall",
    "Copy": "xlstm_rl.envs.copy_items:Copy",
    "Overwrite": "xlstm_rl.envs.overwrite:Overwrite",
    "NearestSoFar": "xlstm_rl.envs.nearest_so_far:NearestSoFar",
    "Cycle": "xlstm_rl.envs.cycle:Cycle",
    "ShellGame": "xlstm_rl.envs.shell_game:ShellGame",
    "NoisyEvidence": "xlstm_rl.envs.noisy_evidence:NoisyEvidence",
    "KeyDoor": "xlstm_rl.envs.key_door:KeyDoor",
    "Pairs": "xlstm_rl.envs.pairs:Pairs",
    "Bandit": "xlstm_rl.envs.bandit:Bandit",
}
# The name here, gymnasium's own id.
CONTROL = {
    "CartPoleNoVelocity": "CartPole-v1",
    "PendulumNoVelocity": "Pendulum-v1",
    "AcrobotNoVelocity": "Acrobot-v1",
}


def register_envs() -> None:
    """Register every task as `xlstm_rl/<Name>-v0`; calling it again changes nothing."""
    for name, entry_point in TASKS.items():
        env_id = f"xlstm_rl/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=entry_point)
    for name, source in CONTROL.items():
        env_id = f"xlstm_rl/{name}-v0"
        if env_id not in gym.registry:
            spec = gym.spec(source)
            gym.register(
                env_id,
                entry_point=spec.entry_point,
                kwargs=spec.kwargs,
                max_episode_steps=spec.max_episode_steps,
                reward_threshold=spec.reward_threshold,
                additional_wrappers=(HideVelocity.wrapper_spec(indices=None),),
            )
