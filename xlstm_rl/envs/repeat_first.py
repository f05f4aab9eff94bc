"""Hold one symbol: say at the end what was shown at the start."""

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import whole_number


@task("RepeatFirst", "hold", "length")
class RepeatFirst(SymbolStreamEnv):
    """Symbols come one per step; at the last step the agent says the first one.

    Ability: hold one item against distractors and act on it much later. Nothing marks the first step, so an agent whose
    memory is not emptied between episodes cannot tell the cue from a distractor.

    Observation: Box [num_symbols + 1], the one-hot symbol, then a flag that is 1 at the last step. Symbols are
    independent and uniform; with `distractors=False` all but the first are blank (zeros).
    Actions: Discrete(num_symbols), the symbol to say; ignored before the last step.
    Reward: 1 at the last step if the first symbol is said, else 0.
    Horizon: `length` steps, then terminated. `info["is_success"]`: the answer was right.
    Optimal return: 1. Memoryless return: 1 / num_symbols, because what the last step shows is independent of the first
    symbol.
    """

    hidden_name = "the first symbol"

    def __init__(
        self, length: int = 24, num_symbols: int = 4, *, distractors: bool = True, render_mode: str | None = None
    ) -> None:
        """Set the size of the task.

        Args:
            length: Steps of an episode, at least 2; `length - 2` of them lie between cue and question.
            num_symbols: Different symbols, at least 2.
            distractors: Whether the steps after the first show symbols too.
            render_mode: None, "ansi" or "rgb_array".
        """
        length = whole_number("length", length, at_least=2)
        self._num_symbols = whole_number("num_symbols", num_symbols, at_least=2)
        self._distractors = distractors
        super().__init__(
            {"symbol": self._num_symbols},
            length=length,
            asked=[length - 1],
            num_answers=self._num_symbols,
            render_mode=render_mode,
        )

    def draw(self, chance: Chance) -> Stream:
        """New symbols, the first of them asked for at the end."""
        symbols = chance.symbols(self._num_symbols, self.length)
        answers = symbols[:, :1].copy()
        if not self._distractors:
            symbols[:, 1:] = self._num_symbols
        return Stream((symbols,), answers)


@task("CueRecall", "hold", "delay")
def cue_recall(delay: int = 8, num_cues: int = 2, *, render_mode: str | None = None) -> RepeatFirst:
    """A cue, `delay` blank steps, then the question which cue it was: `RepeatFirst` without distractors.

    The episode has `delay + 2` steps; spaces, reward and facts are those of `RepeatFirst`.

    Args:
        delay: Blank steps between the cue and the question, at least 0.
        num_cues: Different cues, at least 2.
        render_mode: None, "ansi" or "rgb_array".
    """
    delay = whole_number("delay", delay, at_least=0)
    num_cues = whole_number("num_cues", num_cues, at_least=2)
    return RepeatFirst(delay + 2, num_cues, distractors=False, render_mode=render_mode)


# gymnasium looks here for the render modes that it adds to.
cue_recall.metadata = RepeatFirst.metadata  # type: ignore[attr-defined]
