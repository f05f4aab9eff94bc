"""Gymnasium ids of the tasks."""

import gymnasium as gym

from xlstm_rl.envs.hide_velocity import HideVelocity

# Where each is found in this package, for one environment and for a batch of them.
TASKS = {
    "TMaze": ("t_maze:TMaze", "t_maze_vector:TMazeVectorEnv"),
    "RepeatFirst": ("repeat_first:RepeatFirst", "vector_tasks:repeat_first_vector"),
    "RepeatPrevious": ("repeat_previous:RepeatPrevious", "vector_tasks:repeat_previous_vector"),
    "Parity": ("parity:Parity", "vector_tasks:parity_vector"),
    "KeyValueRecall": ("key_value_recall:KeyValueRecall", "vector_tasks:key_value_recall_vector"),
    "CueRecall": ("repeat_first:cue_recall", "vector_tasks:cue_recall_vector"),
    "Copy": ("copy_items:Copy", "vector_tasks:copy_vector"),
    "Overwrite": ("overwrite:Overwrite", "vector_tasks:overwrite_vector"),
    "NearestSoFar": ("nearest_so_far:NearestSoFar", "vector_tasks:nearest_so_far_vector"),
    "Cycle": ("cycle:Cycle", "vector_tasks:cycle_vector"),
    "ShellGame": ("shell_game:ShellGame", "vector_tasks:shell_game_vector"),
    "NoisyEvidence": ("noisy_evidence:NoisyEvidence", "vector_tasks:noisy_evidence_vector"),
    "KeyDoor": ("key_door:KeyDoor", "vector_tasks:key_door_vector"),
    "Pairs": ("pairs:Pairs", "pairs_vector:PairsVectorEnv"),
    "Bandit": ("bandit:Bandit", "bandit_vector:BanditVectorEnv"),
}
# The name here, gymnasium's own id.
CONTROL = {
    "CartPoleNoVelocity": "CartPole-v1",
    "PendulumNoVelocity": "Pendulum-v1",
    "AcrobotNoVelocity": "Acrobot-v1",
}


def register_envs() -> None:
    """Register every task as `xlstm_rl/<Name>-v0`; calling it again changes nothing."""
    for name, (single, batch) in TASKS.items():
        env_id = f"xlstm_rl/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, f"xlstm_rl.envs.{single}", vector_entry_point=f"xlstm_rl.envs.{batch}")
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
