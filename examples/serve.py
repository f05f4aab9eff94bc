"""Serves an agent to many sessions over HTTP; each has a memory of its own, and steps that wait are taken as one batch.

pip install fastapi uvicorn
python examples/serve.py runs/CartPole-v1-...

    POST /sessions/ANY-NAME/step {"observation": [0.1, 0, 0, 0], "start": true}  ->  {"action": 1}
    DELETE /sessions/ANY-NAME

start: the observation is the first of an episode. A Dict observation is an object with its keys. Action masks are not
taken.
"""

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from gymnasium import spaces
from pydantic import BaseModel

from xlstm_rl import RecurrentPPO
from xlstm_rl.runs.open import open_run

MAX_BATCH, MAX_SESSIONS = 256, 100_000


class StepRequest(BaseModel):
    """What a client sends."""

    observation: Any
    start: bool = False


class Waiting(NamedTuple):
    """A step that waits for its batch."""

    session: str
    observation: Any
    start: bool
    answer: "asyncio.Future[Any]"


class Server:
    """Memory states by session, and the steps that wait for the next batch."""

    def __init__(self, model: RecurrentPPO) -> None:
        self.model, self.normalizer = model, model.get_vec_normalize_env()
        # as the environment gives it
        space = model.observation_space if self.normalizer is None else self.normalizer.venv.observation_space
        self.spaces = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        # the one whose last step is the longest ago comes first
        self.states: OrderedDict[str, tuple[np.ndarray, ...]] = OrderedDict()
        self.waiting: list[Waiting] = []
        self.arrived = asyncio.Event()
        self.batches: list[int] = []

    async def step(self, session: str, request: StepRequest) -> dict[str, Any]:
        """The next action of a session."""
        observation = self.parsed(request.observation)
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(session, observation, request.start, answer))
        self.arrived.set()
        return {"action": (await answer).tolist()}

    async def forget(self, session: str) -> dict[str, bool]:
        """Drop the memory of a session."""
        return {"forgotten": self.states.pop(session, None) is not None}

    def parsed(self, given: Any) -> dict[str, np.ndarray]:
        """An observation as arrays by key; what does not fit the environment is refused."""
        parts = given if isinstance(given, dict) else {"": given}
        if parts.keys() != self.spaces.keys():
            raise HTTPException(422, f"observation must have the keys {sorted(self.spaces)}, not {sorted(parts)}")
        try:
            arrays = {key: np.asarray(parts[key], space.dtype) for key, space in self.spaces.items()}
        except (TypeError, ValueError) as error:
            raise HTTPException(422, f"observation is no array of numbers: {error}") from error
        for key, space in self.spaces.items():
            if not space.contains(arrays[key]):
                raise HTTPException(422, f"observation {key} of shape {arrays[key].shape} is not in {space}")
        return arrays

    async def work(self) -> None:
        """Take what waits as one batch, again and again; while one is computed, the next gathers."""
        while True:
            await self.arrived.wait()
            batch = self.next_batch()
            if not batch:
                self.arrived.clear()
                continue
            try:
                actions = await asyncio.to_thread(self.act, batch)
            except (ValueError, FloatingPointError) as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(HTTPException(500, str(error)))
                continue
            for waiting, action in zip(batch, actions, strict=True):
                # whoever asked may be gone
                if not waiting.answer.done():
                    waiting.answer.set_result(action)

    def next_batch(self) -> list[Waiting]:
        """No session twice: its second step needs what the first remembers."""
        chosen: dict[str, Waiting] = {}
        later = []
        for waiting in self.waiting:
            if waiting.session in chosen or len(chosen) == MAX_BATCH:
                later.append(waiting)
            elif not waiting.start and waiting.session not in self.states:
                waiting.answer.set_exception(HTTPException(404, f"no session {waiting.session}: begin one with start"))
            else:
                chosen[waiting.session] = waiting
        self.waiting = later
        return list(chosen.values())

    def act(self, batch: list[Waiting]) -> np.ndarray:
        """Actions of a batch; the memory of its sessions goes on."""
        parts = {key: np.stack([waiting.observation[key] for waiting in batch]) for key in self.spaces}
        observation: Any = parts.get("", parts)
        if self.normalizer is not None:
            observation = self.normalizer.normalize_obs(observation)
        start = np.array([waiting.start for waiting in batch])
        state = self.states_of(batch)
        actions, after = self.model.predict(observation, state=state, episode_start=start, deterministic=True)
        assert after is not None, "agents here have a memory"
        for row, waiting in enumerate(batch):
            # copies, as a view would keep the states of the whole batch
            self.states[waiting.session] = tuple(leaf[:, row : row + 1].copy() for leaf in after)
            self.states.move_to_end(waiting.session)
        while len(self.states) > MAX_SESSIONS:
            self.states.popitem(last=False)
        self.batches.append(len(batch))
        return actions

    def states_of(self, batch: list[Waiting]) -> tuple[np.ndarray, ...] | None:
        """Memory of all sessions of a batch, empty where one begins; None where all do."""
        known = [self.states.get(waiting.session) for waiting in batch]
        example = next((state for state in known if state is not None), None)
        if example is None:
            return None
        empty = tuple(np.zeros_like(leaf) for leaf in example)
        rows = [empty if state is None else state for state in known]
        return tuple(np.concatenate(leaves, axis=1) for leaves in zip(*rows, strict=True))


def make_app(server: Server) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(server.work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title="An agent with memory", lifespan=lifespan)
    app.add_api_route("/sessions/{session}/step", server.step, methods=["POST"])
    app.add_api_route("/sessions/{session}", server.forget, methods=["DELETE"])
    return app


if __name__ == "__main__":
    with open_run(sys.argv[1], device="cpu") as run:
        uvicorn.run(make_app(Server(run.model)), port=8000)
