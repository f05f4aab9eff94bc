"""The command `xlstm-rl tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.option_types import positive

SIGNAL_EXIT = 128
# Beyond these no search is meant.
MOST_RUNS, MOST_WORKERS = 1e9, 1024


def add_parser(commands: Any, name_help: str, overrides_help: str) -> None:
    """Add `tune` to the commands of a parser (what `add_subparsers` gave)."""
    tune = commands.add_parser(
        "tune",
        help="search settings for a task",
        description="Search settings for a task: a portfolio first, then Optuna. The same command goes on.",
    )
    tune.add_argument("name", metavar="PRESET_OR_ENV_ID", help=name_help)
    tune.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    tune.add_argument("--runs", type=float, default=12.0, help="budget, in whole trainings of total_steps (default 12)")
    tune.add_argument("--minutes", type=float, help="no trial starts later")
    tune.add_argument("--workers", type=positive, default=2, help="trials at the same time (default 2)")
    tune.add_argument("--out", type=Path, help="default: tuning/NAME; what is there is gone on with")
    tune.add_argument(
        "--storage",
        help="a database for workers on several machines, such as postgresql://HOST/NAME; default: a journal in --out",
    )
    tune.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.live import LastingConsole
    from xlstm_rl.tuning.search import tune
    from xlstm_rl.tuning.study import Tuning, storage_told

    for name in ("runs", "minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < MOST_RUNS:
            raise ConfigError(f"--{name} {value} must be above 0 and below {MOST_RUNS:g}")
    if options.workers > MOST_WORKERS:
        raise ConfigError(f"--workers {options.workers} must be at most {MOST_WORKERS}: each is a process")
    stem = Path(options.name).stem if options.name.endswith((".yaml", ".yml")) else options.name
    out = options.out or Path("tuning") / stem.replace("/", "-").replace(":", "-")
    tuning = Tuning(options.name, tuple(options.overrides), out, options.runs, options.minutes, options.storage)
    console = LastingConsole()
    with storage_told(tuning):
        signal = tune(tuning, workers=options.workers, console=console)
    console.print(f"report: {out / 'report.md'}", highlight=False, soft_wrap=True)
    if (out / "best.yaml").is_file():
        console.print(f"xlstm-rl train {out / 'best.yaml'}", highlight=False, soft_wrap=True)
    return 0 if signal is None else SIGNAL_EXIT + signal
