"""The command `xlstm-rl bench`: run, render, compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.option_types import amount, positive
from xlstm_rl.runs.lock import LockedError, exclusive

INCOMPLETE = 3
SOME_FAILED = 1
SIGNAL_EXIT = 128


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands of a parser (what `add_subparsers` gave)."""
    bench = commands.add_parser("bench", help="compare agents on many tasks", description="Compare agents on tasks.")
    actions = bench.add_subparsers(required=True, metavar="ACTION")

    run = actions.add_parser("run", help="train and measure what is missing, then write the card")
    run.add_argument("spec", metavar="SPEC", help="a benchmark of `xlstm-rl list`, or a .yaml file")
    run.add_argument("--out", type=Path, help="default: bench/NAME; what is there already is not done again")
    run.add_argument("--workers", type=positive, default=2, help="processes, one torch thread each (default 2)")
    run.add_argument("--hours", type=amount, help="no new run starts after this time")
    run.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK/AGENT/SEED",
        help="some of the runs; parts may be '*' or left out",
    )
    run.set_defaults(run=_run)

    render = actions.add_parser("render", help="write the card and the figures again from results.json")
    render.add_argument("out", type=Path, metavar="OUT", help="a folder with results.json")
    render.set_defaults(run=_render)

    compare = actions.add_parser("compare", help="what another benchmark did better or worse")
    compare.add_argument("before", type=Path, metavar="OUT1", help="a folder with results.json")
    compare.add_argument("after", type=Path, metavar="OUT2", help="another one, or the same")
    compare.add_argument("--agents", nargs=2, metavar=("A", "B"), help="agent A of OUT1 with agent B of OUT2")
    compare.set_defaults(run=_compare)


def _run(options: argparse.Namespace) -> int:
    from xlstm_rl.bench.card import render
    from xlstm_rl.bench.plan import plan_runs, select_runs
    from xlstm_rl.bench.results import gather, write_results
    from xlstm_rl.bench.runner import check_settings, run_all
    from xlstm_rl.bench.spec import load_spec
    from xlstm_rl.runs.live import LastingConsole

    spec = load_spec(options.spec)
    name = Path(options.spec).name.removesuffix(".yaml").removesuffix(".yml")
    out: Path = options.out or Path("bench") / name
    runs = plan_runs(spec, out)
    chosen = select_runs(runs, options.only)
    console = LastingConsole()
    with _alone_in(out):
        check_settings(runs, spec)
        outcome = run_all(
            chosen,
            spec,
            workers=options.workers,
            hours=options.hours,
            console=console,
            after_each=lambda: write_results(gather(name, spec, runs), out),
        )
        results = gather(name, spec, runs)
        write_results(results, out)
        if results.records:
            render(results, out)
            console.print(f"card: {out / 'card.md'}, {out / 'card.html'}", highlight=False, soft_wrap=True)
    for run in outcome.failed:
        console.print(f"{run.name} failed; the reason is in {run.failure}", highlight=False, soft_wrap=True)
    if outcome.interrupted_by is not None:
        return SIGNAL_EXIT + outcome.interrupted_by
    if outcome.left:
        print(f"xlstm-rl: {len(outcome.left)} runs are left; the same command goes on with them", file=sys.stderr)
        return INCOMPLETE
    return SOME_FAILED if outcome.failed else 0


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep all others from running a benchmark in the folder: they would do the same runs."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(out / "lock"))
        except LockedError as error:
            raise ConfigError(
                f"{error} is running a benchmark in {out}; wait until it has ended, end it, or choose another --out"
            ) from error
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
        yield


def _render(options: argparse.Namespace) -> int:
    from xlstm_rl.bench.card import render
    from xlstm_rl.bench.results import read_results

    render(read_results(options.out), options.out)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from xlstm_rl.bench.comparison import compare
    from xlstm_rl.bench.results import read_results

    pair = None if options.agents is None else (options.agents[0], options.agents[1])
    print(compare(read_results(options.before), read_results(options.after), pair), end="")
    return 0
