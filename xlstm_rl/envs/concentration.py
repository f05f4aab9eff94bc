"""Exact values of the concentration game with a limited number of turns."""

from functools import lru_cache
from typing import NamedTuple

TURN_STEPS = 3


class Knowledge(NamedTuple):
    """What is known about the cards on the table.

    Attributes:
        singles: Cards seen whose partner was not seen.
        pairs: Pairs of which both cards were seen.
        hidden: Cards not seen.
    """

    singles: int
    pairs: int
    hidden: int


class BestPlay:
    """Best play with perfect memory, by dynamic programming over knowledge and turns left.

    Cards that were not seen are exchangeable, so nothing else matters. A turn can take a known pair, or turn a hidden
    card first and then go by its face, or turn a seen single first and then a hidden card; others gain nothing.
    """

    def __init__(self, num_pairs: int, num_turns: int) -> None:
        """Solve the game for up to `num_turns` turns."""
        states = [
            Knowledge(singles, pairs, 2 * left - singles - 2 * pairs)
            for left in range(num_pairs + 1)
            for pairs in range(left + 1)
            for singles in range(left - pairs + 1)
        ]
        self._values = [dict.fromkeys(states, 0.0)]
        for turns in range(1, num_turns + 1):
            self._values.append({state: max(self.first_cards(state, turns).values()) for state in states})
        self.optimal_pairs = self._values[num_turns][Knowledge(0, 0, 2 * num_pairs)]

    def first_cards(self, known: Knowledge, turns: int) -> dict[str, float]:
        """Pairs to be expected from the present turn on, by what is turned first: "pair", "hidden" or "single".

        Args:
            known: Before the turn.
            turns: Left, with this one; at least 1.
        """
        singles, pairs, hidden = known
        later = self._values[turns - 1]
        values = {}
        if pairs:
            values["pair"] = 1.0 + later[Knowledge(singles, pairs - 1, hidden)]
        if hidden:
            value = 0.0
            if hidden > singles:
                new_single = Knowledge(singles + 1, pairs, hidden - 1)
                value += (hidden - singles) / hidden * max(self.second_cards(new_single, turns, "single").values())
            if singles:
                known_partner = Knowledge(singles - 1, pairs + 1, hidden - 1)
                value += singles / hidden * max(self.second_cards(known_partner, turns, "pair").values())
            values["hidden"] = value
        if singles:
            values["single"] = max(self.second_cards(known, turns, "single").values())
        return values or {"nothing": 0.0}

    def second_cards(self, known: Knowledge, turns: int, first: str) -> dict[str, float]:
        """Pairs to be expected, by what is turned second: "partner", "hidden" or "nothing".

        Args:
            known: With the card turned first.
            turns: Left, with this one; at least 1.
            first: What the first card is by now, "single" or one of a "pair".
        """
        singles, pairs, hidden = known
        later = self._values[turns - 1]
        values = {"nothing": later[known]}
        if first == "pair":
            values["partner"] = 1.0 + later[Knowledge(singles, pairs - 1, hidden)]
        if not hidden:
            return values
        others = singles - (first == "single")
        value = 0.0
        if first == "single":
            value += (1.0 + later[Knowledge(singles - 1, pairs, hidden - 1)]) / hidden
        if others:
            value += others / hidden * later[Knowledge(singles - 1, pairs + 1, hidden - 1)]
        if hidden > singles:
            value += (hidden - singles) / hidden * later[Knowledge(singles + 1, pairs, hidden - 1)]
        values["hidden"] = value
        return values


@lru_cache(maxsize=16)
def best_play(num_pairs: int, num_turns: int) -> BestPlay:
    """The solved game, shared between environments."""
    return BestPlay(num_pairs, num_turns)


def pairs_found_blindly(num_pairs: int, num_turns: int) -> float:
    """Expected pairs of uniform picks: with r pairs left, a turn finds one with probability 1 / (2 r - 1)."""
    chances = [0.0] * num_pairs + [1.0]  # by pairs left
    for _ in range(num_turns):
        for left in range(1, num_pairs + 1):
            found = chances[left] / (2 * left - 1)
            chances[left] -= found
            chances[left - 1] += found
    return num_pairs - sum(left * chance for left, chance in enumerate(chances))
