"""The comparison with other libraries, as far as it goes without them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import of_cleanrl, of_sb3, setting
from xlstm_rl import XLSTMPolicy


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_cleanrl.make, of_sb3.contrib, of_sb3.ours("lstm"), of_sb3.recommended])
def test_resets_are_exact_and_rates_are_told(make: peers.Make) -> None:
    made = {"one": make("cartpole", 8)}
    assert peers.measure(made, 1)["one"][0] > 0
    assert made["one"].error() < 1e-4


def test_an_error_of_the_memory_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_sb3, "N_STEPS", 32)
    monkeypatch.setitem(of_sb3.SETTINGS, "n_steps", 32)
    contender = of_sb3.ours("lstm")("cartpole", 8)
    contender.iterate()
    assert contender.error() < 1e-4
    evaluate: Any = XLSTMPolicy.evaluate_sequence
    monkeypatch.setattr(
        XLSTMPolicy,
        "evaluate_sequence",
        lambda self, obs, actions, state, reset: evaluate(self, obs, actions, state, ~reset),
    )
    assert contender.error() > 1e-4


def test_episodes_are_as_long_as_they_say() -> None:
    env = setting.LongEpisodes()
    lengths = []
    for seed in range(2):
        env.reset(seed=seed)
        lengths.append(next(t for t in range(1, 300) if env.step(0)[2]))  # type: ignore[arg-type]
    assert lengths[0] <= 200 and lengths[1] == 200


def test_all_are_compared_with_the_first() -> None:
    labels = list(peers.contenders(["recommended"]))
    assert labels == [peers.BASE, "xlstm_rl, recommended"]
