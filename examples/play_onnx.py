"""Plays an episode with an exported policy; needs onnxruntime, NumPy and gymnasium, and no torch.

xlstm-rl export runs/... policy.onnx
python examples/play_onnx.py policy.onnx CartPole-v1 500

A task that a package registers is written module:id, as in xlstm_rl:xlstm_rl/TMaze-v0: gymnasium imports the module
first. This package imports torch.
"""

import json
import sys
import time
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime


def play(path: str, env_id: str, longest: int) -> float:
    session = onnxruntime.InferenceSession(path)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["xlstm_rl"])
    names = [output.name for output in session.get_outputs()]
    # what the agent remembers: zeros at first, then what the last step returned
    state = {name: np.zeros((1, *leaf["shape"]), leaf["dtype"]) for name, leaf in facts["state"].items()}
    env = gym.make(env_id, max_episode_steps=longest)
    (obs, _), space, part = env.reset(seed=0), env.action_space, max(1, longest // 5)
    told = dict[str, Any](previous_action=np.zeros(gym.spaces.flatdim(space)), previous_reward=[0], episode_start=[1])
    total, steps, seconds, ended = 0.0, 0, deque[float](maxlen=part), False
    while not ended:
        seen = {**told, **(obs if isinstance(obs, dict) else {"observation": obs})}
        fed = {**state, "reset": np.array([steps == 0])}
        for name, entry in facts["inputs"]["observations"].items():
            fed[name] = np.asarray(seen[name.removeprefix("observation.")], entry["dtype"])[None]
        if facts["inputs"]["action_mask"]:
            fed["action_mask"] = np.ravel(env.get_wrapper_attr("action_masks")())[None].astype(np.bool_)
        begun = time.perf_counter()
        result = dict(zip(names, session.run(names, fed), strict=True))
        seconds.append(time.perf_counter() - begun)
        state, action = {name: result[leaf["next"]] for name, leaf in facts["state"].items()}, result["action"][0]
        obs, reward, terminated, truncated, _ = env.step(action)
        told = dict(previous_action=gym.spaces.flatten(space, action), previous_reward=[reward], episode_start=[0])
        total, steps, ended = total + float(reward), steps + 1, terminated or truncated
        if ended or steps % part == 0:
            milliseconds, size = 1e3 * np.median(seconds), sum(leaf.nbytes for leaf in state.values())
            print(f"step {steps:>6}: {milliseconds:.3f} ms a step, state {size} bytes{process_size()}")
    print(f"return {total:.2f} after {steps} steps")
    return total


def process_size() -> str:
    if sys.platform == "win32":
        return ""  # its standard library does not tell
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        return f", process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        play(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except gym.error.NamespaceNotFound as error:
        sys.exit(f"{error} Name the module that registers it too, as in xlstm_rl:xlstm_rl/TMaze-v0.")
