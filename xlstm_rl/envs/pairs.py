"""Concentration: find pairs among cards that are turned down again."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs.concentration import TURN_STEPS, Knowledge, best_play, pairs_found_blindly
from xlstm_rl.envs.random_draws import Chance, Symbols
from xlstm_rl.envs.task import TaskFacts, task
from xlstm_rl.envs.task_pictures import Picture, draw
from xlstm_rl.envs.task_sizes import RENDER_MODES, known_render_mode, whole_number

FIRST, SECOND, LOOK = range(TURN_STEPS)


# more pairs need other observations, more turns make it easier: no length
@task("Pairs", "self-directed")
class Pairs(gym.Env[NDArray[np.float32], np.int64]):
    """Cards lie face down; a turn turns two of them over, and equal ones are taken.

    Ability: recall by content of what one's own actions brought to light, and the choice of what to look at.

    Observation: Box [2 * num_pairs * (num_pairs + 1) + 3], 0 or 1: which cards were taken; for every card, the one-hot
    face while it is up; the one-hot phase of the turn (first card, second card, look). The look shows both cards of the
    turn; the observation after it shows nothing but the cards taken. Zeros after the last step. The deck is in uniform
    order.
    Actions: Discrete(2 * num_pairs), the card to turn over; ignored in the look. A card that is up or was taken turns
    nothing over, and the phase passes.
    Reward: 1 / num_pairs when the second card is equal to the first.
    Horizon: 3 * num_turns - 1 steps, there is no look after the last turn; `terminated` then, or when all pairs are
    found. `info["is_success"]`: all pairs were found.
    Optimal return: by dynamic programming over what is known of the cards and the turns left (`BestPlay`); 1 from
    2 * num_pairs turns on, which suffice to see all cards and then to take them, and 0.967 with 4 pairs and 6 turns.
    Memoryless return: that of uniform picks among the other cards on the table, a Markov chain with chance
    1 / (2 r - 1) to find one of r pairs in a turn; 0.373 with 4 pairs and 8 turns. With the same cards taken, such a
    policy has the same chance in every turn. The mean of that chance over decks is 1 / (2 r - 1) whatever it picks, and
    the chance to find a pair within some turns is concave in it, so that none beats the policy for which it is the same
    in all decks. This proves the value for 2 pairs; for more, where which cards were taken could tell about the rest, a
    gradient search over all stochastic policies (3 pairs, 6 turns, 6 starts) found none better.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}
    hidden_name = "the face of card 0, once seen"
    """Of `hidden_variable`."""

    def __init__(self, num_pairs: int = 4, num_turns: int | None = None, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            num_pairs: Pairs of cards, at least 2.
            num_turns: Turns of an episode, at least 1; None for twice the number of pairs.
            render_mode: None, "ansi" or "rgb_array".
        """
        self.num_pairs = whole_number("num_pairs", num_pairs, at_least=2)
        self.num_cards = 2 * self.num_pairs
        self.num_turns = self.num_cards if num_turns is None else whole_number("num_turns", num_turns, at_least=1)
        self.render_mode = known_render_mode(render_mode)
        size = self.num_cards * (self.num_pairs + 1) + TURN_STEPS
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(self.num_cards)
        self._best_play = best_play(self.num_pairs, self.num_turns)
        self.facts = TaskFacts(
            TURN_STEPS * self.num_turns - 1,
            self._best_play.optimal_pairs / self.num_pairs,
            pairs_found_blindly(self.num_pairs, self.num_turns) / self.num_pairs,
        )
        self.faces: list[int] = [0] * self.num_cards
        self.taken = [False] * self.num_cards
        self.seen = [False] * self.num_cards
        self.up: list[int] = []
        self.steps = self.facts.horizon
        self.ended = True

    def draw(self, chance: Chance) -> Symbols:
        """Decks in uniform order: the face of every card, [N, 2 * num_pairs]."""
        return chance.permutation(self.num_cards) // 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Lay out a new deck; `options` are not used."""
        super().reset(seed=seed)
        self.faces = self.draw(Chance([self.np_random]))[0].tolist()
        self.taken = [False] * self.num_cards
        self.seen = [False] * self.num_cards
        self.up = []
        self.steps = 0
        self.ended = False
        return self._observe(), {}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Turn a card over, or turn down or take the two that are up."""
        card = int(action)
        if not 0 <= card < self.num_cards:
            raise ValueError(f"action must be in 0..{self.num_cards - 1}, got {action}")
        if self.ended:
            raise gym.error.ResetNeeded("the episode is over or was never started; call reset()")
        phase = self.steps % TURN_STEPS
        self.steps += 1
        reward = 0.0
        if phase == LOOK:
            self.up = []
        elif not self.taken[card] and card not in self.up:
            self.up.append(card)
            self.seen[card] = True
            reward = self._take_if_equal()
        success = all(self.taken)
        self.ended = success or self.steps == self.facts.horizon
        return self._observe(), reward, self.ended, False, {"is_success": success} if self.ended else {}

    def _take_if_equal(self) -> float:
        if len(self.up) < 2 or self.faces[self.up[0]] != self.faces[self.up[1]]:
            return 0.0
        for card in self.up:
            self.taken[card] = True
        return 1.0 / self.num_pairs

    def _observe(self) -> NDArray[np.float32]:
        seen = np.zeros(self.observation_space.shape or (), np.float32)
        if self.ended:
            return seen
        # Cards just found are taken away by the look.
        seen[: self.num_cards] = self.taken
        for card in self.up:
            seen[card] = 0.0
            seen[self.num_cards + card * self.num_pairs + self.faces[card]] = 1.0
        seen[self.steps % TURN_STEPS - TURN_STEPS] = 1.0
        return seen

    def hidden_variable(self) -> int:
        """The face of card 0, once it was seen; `num_pairs` before."""
        return self.faces[0] if self.seen[0] else self.num_pairs

    def oracle_action(self) -> int:
        """What `BestPlay` turns over, with the cards seen so far known; 0 where nothing is to be turned over."""
        phase = self.steps % TURN_STEPS
        if self.ended or phase == LOOK:
            return 0
        singles, pairs, hidden = self._sorted_cards()
        turns = self.num_turns - self.steps // TURN_STEPS
        known = Knowledge(len(singles), len(pairs) // 2, len(hidden))
        if phase == FIRST:
            first = self._best_play.first_cards(known, turns)
            return {"pair": pairs, "hidden": hidden, "single": singles}[max(first, key=first.__getitem__)][0]
        if not self.up:
            return (hidden or singles or pairs)[0]
        (card,) = self.up
        second = self._best_play.second_cards(known, turns, "pair" if card in pairs else "single")
        choice = max(second, key=second.__getitem__)
        if choice == "partner":
            return next(other for other in pairs if other != card and self.faces[other] == self.faces[card])
        return hidden[0] if choice == "hidden" else card

    def _sorted_cards(self) -> tuple[list[int], list[int], list[int]]:
        """Cards on the table: seen without, seen with a seen partner, and not seen."""
        table = [card for card in range(self.num_cards) if not self.taken[card]]
        seen_faces = [self.faces[card] for card in table if self.seen[card]]
        singles = [card for card in table if self.seen[card] and seen_faces.count(self.faces[card]) == 1]
        pairs = [card for card in table if self.seen[card] and seen_faces.count(self.faces[card]) == 2]
        return singles, pairs, [card for card in table if not self.seen[card]]

    def render(self) -> str | Picture | None:
        """The table as a line of text (`# # 2 . #`: down, up with its face, taken) or as cells by face."""
        return draw(self.render_mode, self._describe, self._brightness)

    def _describe(self) -> str:
        cards = [
            str(self.faces[card]) if card in self.up else "." if self.taken[card] else "#"
            for card in range(self.num_cards)
        ]
        return f"turn {self.steps // TURN_STEPS + 1}/{self.num_turns}: {' '.join(cards)}\n"

    def _brightness(self) -> NDArray[np.float32]:
        """Row 0 for cards that are down, then a row for each face."""
        cells = np.zeros((self.num_pairs + 1, self.num_cards), np.float32)
        for card in range(self.num_cards):
            if card in self.up:
                cells[1 + self.faces[card], card] = 1.0
            elif not self.taken[card]:
                cells[0, card] = 0.4
        return cells
