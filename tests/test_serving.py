"""The server of the examples answers a hundred sessions at once as it answers each alone."""

from __future__ import annotations

import asyncio
import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl import RecurrentPPO

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
import uvicorn

N_SESSIONS, STEPS = 100, 6


class Served(NamedTuple):
    server: Any
    url: str


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server of its own, over a real socket, with normalised observations and continuous actions."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "serve.py"))
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))
    kwargs = {"memory_kwargs": {"hidden_size": 16, "num_heads": 2, "blocks": "sm"}}
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, policy_kwargs=kwargs)
    model.learn(32)
    server = example["Server"](model)
    config = uvicorn.Config(example["make_app"](server), port=0, log_level="warning", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Served(server, f"http://127.0.0.1:{port}")
    running.should_exit = True
    thread.join()


def observations() -> np.ndarray:
    """[sessions, steps, 3], within the bounds of Pendulum."""
    return np.random.default_rng(0).uniform(-1, 1, (N_SESSIONS, STEPS, 3)).astype(np.float32)


def starts(session: int, step: int) -> bool:
    """Some sessions begin a second episode, each at a step of its own."""
    return step == 0 or step == session % (2 * STEPS)


async def play_all(url: str, prefix: str) -> np.ndarray:
    """Actions [sessions, steps] of sessions that go on at the same time."""
    seen = observations()
    limits = httpx.Limits(max_connections=N_SESSIONS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:

        async def play(session: int) -> list[float]:
            actions = []
            for step in range(STEPS):
                asked = {"observation": seen[session, step].tolist(), "start": starts(session, step)}
                answer = await client.post(f"/sessions/{prefix}{session}/step", json=asked)
                assert answer.status_code == 200, answer.text
                actions.append(answer.json()["action"][0])
            return actions

        return np.array(await asyncio.gather(*(play(session) for session in range(N_SESSIONS))))


def test_hundred_sessions_at_once_equal_each_alone(served: Served) -> None:
    together = asyncio.run(play_all(served.url, "together-"))
    assert max(served.server.batches) > 10, "nothing was batched"
    model, seen = served.server.model, observations()
    for session in range(N_SESSIONS):
        state = None
        for step in range(STEPS):
            obs = served.server.normalizer.normalize_obs(seen[session, step][None])
            start = np.array([starts(session, step)])
            action, state = model.predict(obs, state=state, episode_start=start, deterministic=True)
            np.testing.assert_allclose(together[session, step], action[0, 0], atol=1e-5)


def test_session_that_nobody_began_is_told(served: Served) -> None:
    answer = httpx.post(f"{served.url}/sessions/unknown/step", json={"observation": [0.0, 0.0, 0.0]})
    assert answer.status_code == 404
    assert "no session unknown: begin one with start" in answer.text


@pytest.mark.parametrize("observation", [[0.0, 0.0], "text", {"other": [0.0]}, [[0.0], [0.0, 1.0]]], ids=str)
def test_observation_of_another_kind_is_told(served: Served, observation: Any) -> None:
    answer = httpx.post(f"{served.url}/sessions/wrong/step", json={"observation": observation, "start": True})
    assert answer.status_code == 422
    assert "observation" in answer.text


def test_forgotten_session_has_to_begin_again(served: Served) -> None:
    url = f"{served.url}/sessions/short"
    assert httpx.post(f"{url}/step", json={"observation": [0.0, 0.0, 0.0], "start": True}).status_code == 200
    assert httpx.delete(url).json() == {"forgotten": True}
    assert httpx.post(f"{url}/step", json={"observation": [0.0, 0.0, 0.0]}).status_code == 404
