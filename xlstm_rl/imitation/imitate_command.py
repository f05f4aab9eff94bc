"""The command `xlstm-rl imitate`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from xlstm_rl.configs import load
from xlstm_rl.configs.option_types import positive


def add_parser(commands: Any, name_help: str, overrides_help: str) -> None:
    """Add `imitate` to the commands of a parser (what `add_subparsers` gave)."""
    imitate = commands.add_parser(
        "imitate",
        help="learn from demonstrations",
        description="Train an agent to do as in demonstrations; train NAME init.from=RUN goes on by PPO.",
    )
    imitate.add_argument("name", metavar="PRESET_OR_ENV_ID", help=name_help)
    imitate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    source_help = (
        "oracle, for what oracle_action() of the environment says, or the id of a Minari dataset on this machine"
    )
    imitate.add_argument("--from", dest="source", required=True, metavar="SOURCE", help=source_help)
    episodes_help = "default: 1,000 of the oracle, all of a dataset; a tenth of them is held out"
    imitate.add_argument("--episodes", type=positive, help=episodes_help)
    imitate.add_argument("--epochs", type=positive, default=20, help="passes over the episodes; default 20")
    imitate.add_argument("--run-dir", type=Path, help="a folder that does not exist yet; default runs/NAME-seedN-TIME")
    imitate.set_defaults(run=_imitate)


def _imitate(options: argparse.Namespace) -> int:
    config = load(options.name, options.overrides)
    # Loaded only now, so that mistakes in the arguments are told at once.
    from xlstm_rl.imitation.imitated_run import imitate_run
    from xlstm_rl.runs.folder import default_run_path
    from xlstm_rl.runs.live import LastingConsole, say

    console = LastingConsole()
    name = Path(options.name).name.removesuffix(".yaml")
    folder = imitate_run(
        config,
        options.source,
        options.run_dir or default_run_path(f"{name}-imitated", config.seed),
        n_episodes=options.episodes,
        epochs=options.epochs,
        console=console,
    )
    words = shlex.join([options.name, *options.overrides, f"init.from={folder}"])
    say(console, f"go on by PPO with: xlstm-rl train {words}")
    return 0
