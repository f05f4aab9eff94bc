"""What a study shows while it runs, and what it leaves: a table, a picture, importances and the best settings."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.configs import PolicyConfig, PPOConfig, TrainConfig, dump
from xlstm_rl.runs.live import say
from xlstm_rl.tuning.study import JUDGED, Tuning, flat

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

# Trials that a terminal shows at a time.
SHOWN = 12


class StudyView:
    """The trials of a study: a table that updates on a terminal, elsewhere a line for each that ends.

    Args:
        tuning: the search.
        study: read again and again.
        console: where to print.
    """

    def __init__(self, tuning: Tuning, study: Study, console: Console) -> None:
        self._tuning, self._study, self._console = tuning, study, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._told = {trial.number for trial in _ended(study)}

    def __enter__(self) -> StudyView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.update()
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Show what is new."""
        if self._live is not None:
            self._live.update(_table(self._tuning, self._study, SHOWN), refresh=True)
            return
        for trial in _ended(self._study):
            if trial.number not in self._told:
                self._told.add(trial.number)
                say(self._console, f"trial {trial.number}: {_how(trial)}; {_what(self._tuning, trial)}")


def write_report(tuning: Tuning, study: Study) -> None:
    """Write `report.md`, `curves.png` and, once a trial came to its end, `best.yaml`."""
    lines = [f"# Tuning {tuning.name}", "", *_summary(tuning, study), ""]
    lines += [
        "| trial | from | return at the end | steps | CPU s | settings that differ |",
        "|---|---|---|---|---|---|",
    ]
    for trial in sorted(_ended(study), key=lambda trial: -_value(trial)):
        steps, seconds = trial.user_attrs.get("steps", 0), trial.user_attrs.get("cpu_seconds", 0)
        kind = trial.user_attrs.get("kind", "search")
        lines.append(
            f"| {trial.number} | {kind} | {_how(trial)} | {steps:,} | {seconds:.0f} | {_what(tuning, trial)} |"
        )
    importances = _importances(study)
    if importances:
        lines += ["", "## What mattered", "", "| setting | importance |", "|---|---|"]
        lines += [f"| {key} | {value:.2f} |" for key, value in importances.items()]
    best = best_trial(study)
    if best is not None:
        config = tuning.trial_config(best.user_attrs["overrides"])
        write_whole(tuning.out / "best.yaml", dump(config).encode())
        lines += ["", "## The best settings", "", f"`xlstm-rl train {tuning.out / 'best.yaml'}`", ""]
        lines += ["```yaml", _snippet(config).rstrip(), "```"]
    _draw(study, tuning)
    write_whole(tuning.out / "report.md", ("\n".join([*lines, "", "![curves](curves.png)"]) + "\n").encode())


def _summary(tuning: Tuning, study: Study) -> list[str]:
    ended, best, first = _ended(study), best_trial(study), _first(study)
    steps = sum(int(trial.user_attrs.get("steps", 0)) for trial in ended)
    pruned = sum(not _whole(trial) for trial in ended)
    text = [f"{len(ended)} trials, {pruned} of them ended early, {steps:,} of {tuning.budget:,} steps."]
    if best is not None and first is not None and best.number != first.number:
        gain, error = _value(best) - _value(first), _error(best, first)
        text.append(f"Best: {_value(best):.3g}; as it was: {_value(first):.3g}.")
        if gain < 2 * error:
            text.append(
                f"**This is within the noise**: the difference of {gain:.2g} is less than twice its standard error of "
                f"{error:.2g}. Train both with several seeds before you believe in it."
            )
    elif best is not None and first is not None and best.number == first.number:
        text.append(f"Nothing was better than the settings as they were ({_value(best):.3g}).")
    return text


def best_trial(study: Study) -> FrozenTrial | None:
    """The trial with the largest objective of those that came to their end, or None."""
    return max(filter(_whole, _ended(study)), key=_value, default=None)


def _first(study: Study) -> FrozenTrial | None:
    """The last whole trial of the settings as they are."""
    same = [trial for trial in _ended(study) if _whole(trial) and trial.user_attrs.get("kind") == "as it is"]
    return same[-1] if same else None


def _error(best: FrozenTrial, first: FrozenTrial) -> float:
    """Standard error of the difference of two objectives, by the scatter of the evaluations that they are means of."""
    ends = [list(trial.intermediate_values.values())[-JUDGED:] for trial in (best, first)]
    return math.sqrt(sum(statistics.variance(end) / len(end) for end in ends if len(end) > 1))


def _ended(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _whole(trial: FrozenTrial) -> bool:
    """Whether it came to its end; one that was pruned has its last evaluation as value."""
    from optuna.trial import TrialState

    return trial.state == TrialState.COMPLETE


def _value(trial: FrozenTrial) -> float:
    return float(trial.value) if _whole(trial) and trial.value is not None else -math.inf


def _how(trial: FrozenTrial) -> str:
    if _whole(trial):
        return f"{_value(trial):.3g}"
    if trial.user_attrs.get("stopped"):
        return f"stopped: {trial.user_attrs['stopped']}"
    last = [*trial.intermediate_values.values()][-1:]
    return f"ended early at {last[0]:.3g}" if last else "ended early"


def _what(tuning: Tuning, trial: FrozenTrial) -> str:
    """The settings of a trial that differ from those that are tuned."""
    if "overrides" not in trial.user_attrs:
        return "not built"
    before, after = flat(tuning.config), flat(tuning.trial_config(trial.user_attrs["overrides"]))
    changed = [f"{key}={value}" for key, value in after.items() if before.get(key) != value]
    return " ".join(changed) or "as it is"


def _importances(study: Study) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if len({_value(trial) for trial in filter(_whole, _ended(study))}) < 4:
        # nothing can be said of so few
        return {}
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _table(tuning: Tuning, study: Study, shown: int) -> Table:
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    steps = sum(int(trial.user_attrs.get("steps", 0)) for trial in trials)
    best = best_trial(study)
    title = f"{tuning.name}: {steps:,} of {tuning.budget:,} steps"
    table = Table(title=title, caption=None if best is None else f"best: trial {best.number}, {_value(best):.3g}")
    for column in ("trial", "from", "steps", "return", ""):
        table.add_column(column, overflow="fold")
    begun = [trial for trial in trials if trial.state not in (TrialState.WAITING, TrialState.FAIL)]
    for trial in begun[-shown:]:
        last = [*trial.intermediate_values.values()][-1:]
        figure = _value(trial) if _whole(trial) else last[0] if last else None
        state = {TrialState.RUNNING: "runs", TrialState.PRUNED: "ended early"}.get(trial.state, "")
        table.add_row(
            str(trial.number),
            str(trial.user_attrs.get("kind", "search")),
            f"{trial.user_attrs.get('steps', 0):,}",
            "" if figure is None else f"{figure:.3g}",
            state,
        )
    return table


def _draw(study: Study, tuning: Tuning) -> None:
    # Loaded here because most uses of the package never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    best, every = best_trial(study), tuning.config.total_steps / 10
    for trial in _ended(study):
        points: Sequence[tuple[int, float]] = [*trial.intermediate_values.items()]
        if points:
            first = trial.user_attrs.get("kind") == "as it is"
            is_best = best is not None and trial.number == best.number
            style: dict[str, Any] = {"color": "C1" if is_best else "C0" if first else "0.75"}
            if is_best or first:
                style |= {"linewidth": 2, "zorder": 3, "label": "best" if is_best else "as it is"}
            axes.plot([step * every for step, _ in points], [value for _, value in points], marker=".", **style)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of evaluation")
    axes.set_title(tuning.name)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(tuning.out / "curves.png", picture.getvalue())


def _snippet(config: TrainConfig) -> str:
    """The sections `memory`, `policy` and `ppo` of a configuration, without what is the default there."""
    values = yaml.safe_load(dump(config))
    sections = {"memory": values["memory"]}
    for name, default in (("policy", PolicyConfig()), ("ppo", PPOConfig())):
        sections[name] = {key: value for key, value in values[name].items() if value != getattr(default, key)}
    kept = {name: section for name, section in sections.items() if section}
    return yaml.safe_dump(kept, sort_keys=False, width=120, default_flow_style=None)
