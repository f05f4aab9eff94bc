"""The command `xlstm-rl`: train, imitate, evaluate, export, inspect, probe, play, push, tune, bench, list, show."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from xlstm_rl._version import __version__
from xlstm_rl.bench.commands import add_parser as add_bench_parser
from xlstm_rl.configs import ConfigError, dump, load, preset_names
from xlstm_rl.configs.option_types import natural, positive
from xlstm_rl.imitation.imitate_command import add_parser as add_imitate_parser
from xlstm_rl.runs.live import LastingConsole, drop_output, say
from xlstm_rl.tuning.command import add_parser as add_tune_parser

# What a shell reports for a program that a signal ended, less the signal's number.
SIGNAL_EXIT = 128
INTERRUPTED = SIGNAL_EXIT + 2
USAGE_ERROR = 2
STOPPED = 1
# Of torchrun: how often it starts the command again.
RESTARTS = "TORCHELASTIC_MAX_RESTARTS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: None takes those of the process.

    Returns:
        The exit code: 0, 1 where a fault ended training or an evaluation or a file cannot be read or written, 2 for a
        wrong configuration, 128 plus the signal after an interruption.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # terminals that do not know a character get its number
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    # argparse takes no more of a list of arguments once an option has come between
    if "overrides" in options and not any(text.startswith("-") for text in left):
        options.overrides += left
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return STOPPED
    except OSError as error:
        place = "" if error.filename is None else f" ({error.filename})"
        print(f"xlstm-rl: {error.strerror or error}{place}; what was saved until now is kept", file=sys.stderr)
        return STOPPED
    except ConfigError as error:
        print(f"xlstm-rl: {error}", file=sys.stderr)
        return USAGE_ERROR
    except RuntimeError as error:
        # Loaded here because few commands need it.
        from xlstm_rl.agents.parallel import RankError
        from xlstm_rl.runs.train import TrainingStoppedError
        from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

        if not isinstance(error, FaultyEnvironmentError | RankError | TrainingStoppedError):
            raise
        print(f"xlstm-rl: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("xlstm-rl: interrupted; what was saved until now is kept", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xlstm-rl", description="Reinforcement-learning agents with an xLSTM memory.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an agent and evaluate it", description="Train an agent.")
    name_help = (
        "a preset, any gymnasium id (your_module:Env-v0 for one of yours), or a .yaml file, which starts from the "
        "preset or id it names as base"
    )
    overrides_help = "such as memory.hidden_size=128 seed=3"
    train.add_argument("name", nargs="?", metavar="PRESET_OR_ENV_ID", help=name_help)
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    train.add_argument("--run-dir", type=Path, help="a folder that does not exist yet; default runs/NAME-seedN-TIME")
    train.add_argument(
        "--new-episodes", action="store_true", help="with --resume: start new episodes, on any number of processes"
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, [total_steps=N]")
    train.set_defaults(run=partial(_train, train))

    add_imitate_parser(commands, name_help, overrides_help)

    run_help = "a run folder, or hf://user/repo"
    evaluate = commands.add_parser("evaluate", help="evaluate a run", description="Evaluate the last model of a run.")
    evaluate.add_argument("run_dir", metavar="RUN", help=run_help)
    evaluate.add_argument("--episodes", type=positive, help="default: as configured")
    evaluate.add_argument("--seed", type=natural, help="of the episodes; default: those that train ended with")
    evaluate.add_argument("--device", help="default: as trained, or the CPU where that device is missing")
    evaluate.add_argument("--best", action="store_true", help="the model of the best evaluation during training")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export", help="write a policy as ONNX or C", description="Write a policy as an ONNX file, or as a C file."
    )
    export.add_argument("run_dir", metavar="RUN", help=run_help)
    export.add_argument(
        "path",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="policy.c is written as C; default: policy.onnx in the run folder",
    )
    export.add_argument("--int8", action="store_true", help="of a C file: weights as int8")
    export.add_argument("--best", action="store_true", help="the model of the best evaluation during training")
    export.set_defaults(run=_export)

    inspect = commands.add_parser("inspect", help="draw an episode", description="Draw what the memory does.")
    inspect.add_argument("run_dir", metavar="RUN", help=run_help)
    inspect.add_argument("--best", action="store_true", help="the model of the best evaluation during training")
    inspect.add_argument("--max-steps", type=positive, default=300, help="the episode is cut there; default 300")
    inspect.add_argument("--seed", type=natural, help="of the episode")
    inspect.set_defaults(run=_inspect)

    probe = commands.add_parser(
        "probe", help="read the memory", description="Read the hidden variable of the task from the memory."
    )
    probe.add_argument("run_dir", metavar="RUN", help=run_help)
    probe.add_argument("--beside", metavar="RUN2", help="another run, drawn beside it")
    probe.add_argument("--best", action="store_true", help="the models of the best evaluations during training")
    probe.add_argument("--episodes", type=positive, default=400, help="half of them train the probes; default 400")
    probe.add_argument("--max-steps", type=positive, default=200, help="later steps are not probed; default 200")
    probe.set_defaults(run=_probe)

    play = commands.add_parser("play", help="watch or record episodes", description="Play episodes of a run.")
    play.add_argument("run_dir", metavar="RUN", help=run_help)
    play.add_argument("--best", action="store_true", help="the model of the best evaluation during training")
    play.add_argument("--episodes", type=positive, default=5, help="default 5")
    play.add_argument("--mode", choices=("human", "ansi", "none"), help="a window, text, or returns alone")
    play.add_argument("--record", type=Path, metavar="FILE", help="a video of all episodes, .mp4 or .gif")
    play.add_argument("--memory", action="store_true", help="with --record: draw the memory beside the frames")
    play.add_argument("--sample", action="store_true", help="sampled actions instead of the most likely ones")
    play.add_argument("--seed", type=natural, help="of the episodes")
    play.set_defaults(run=_play)

    push = commands.add_parser(
        "push",
        help="upload a run to the Hugging Face Hub",
        description="Upload a run with a model card; hf://user/repo then stands for it in the other commands.",
    )
    push.add_argument("run_dir", metavar="RUN", help="a run folder")
    push.add_argument("repository", metavar="USER/REPO", help="made if it is missing")
    push.add_argument("--private", action="store_true", help="of a new repository")
    push.add_argument("--episodes", type=positive, help="played for the card by each agent; default: as configured")
    push.set_defaults(run=_push)

    add_tune_parser(commands, name_help, overrides_help)
    add_bench_parser(commands)

    listing = commands.add_parser(
        "list", help="presets, environments, memories, benchmarks", description="What there is."
    )
    word_help = "only what has it in its name, such as popgym; into a pipe go names alone, one a line"
    listing.add_argument("word", nargs="?", default="", type=str.lower, metavar="WORD", help=word_help)
    listing.set_defaults(run=_list)

    show = commands.add_parser(
        "show", help="the settings that train would use", description="Print what train would use, as YAML it can read."
    )
    show.add_argument("name", metavar="PRESET_OR_ENV_ID", help=name_help)
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=overrides_help)
    show.set_defaults(run=_show)
    return parser


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if (options.name is None) == (options.resume is None) and "=" not in (options.name or ""):
        parser.error("give either PRESET_OR_ENV_ID or --resume RUN")
    if options.resume is not None and options.run_dir is not None:
        parser.error("--resume goes on in the folder of the run, so --run-dir has no place")
    config = None if options.resume is not None else load(options.name, options.overrides)
    # Loaded only now, so that mistakes in the arguments are told at once.
    from xlstm_rl.runs.folder import default_run_path
    from xlstm_rl.runs.train import resume, train

    if options.new_episodes and options.resume is None:
        parser.error("--new-episodes goes with --resume")
    if config is not None and RESTARTS in os.environ and int(os.environ[RESTARTS]) > 0:
        # torchrun starts the same command again where a process has died
        if options.run_dir is None:
            parser.error("torchrun --max-restarts needs --run-dir, so that a restart finds the run")
        if (options.run_dir / "config.yaml").is_file():
            options.resume, options.name, options.overrides, config = options.run_dir, None, [], None
    if config is None:
        overrides = [text for text in (options.name, *options.overrides) if text is not None]
        result = resume(options.resume, overrides, new_episodes=options.new_episodes, console=LastingConsole())
    else:
        run_dir = options.run_dir or default_run_path(Path(options.name).name.removesuffix(".yaml"), config.seed)
        result = train(config, run_dir, numbered=options.run_dir is None, console=LastingConsole())
    return 0 if result.interrupted_by is None else SIGNAL_EXIT + result.interrupted_by


def _evaluate(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.scores import show_scores
    from xlstm_rl.runs.train import evaluate_run

    console = LastingConsole()
    scores = evaluate_run(
        options.run_dir,
        n_episodes=options.episodes,
        seed=options.seed,
        device=options.device,
        best=options.best,
        console=console,
    )
    show_scores(console, scores, str(options.run_dir))
    return 0


def _export(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.open import export_run

    export_run(options.run_dir, options.path, best=options.best, int8=options.int8, console=LastingConsole())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.open import inspect_run

    inspect_run(
        options.run_dir, best=options.best, max_steps=options.max_steps, seed=options.seed, console=LastingConsole()
    )
    return 0


def _probe(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.open import probe_run

    probe_run(
        options.run_dir,
        beside=options.beside,
        best=options.best,
        episodes=options.episodes,
        max_steps=options.max_steps,
        console=LastingConsole(),
    )
    return 0


def _play(options: argparse.Namespace) -> int:
    from xlstm_rl.runs.open import play_run

    play_run(
        options.run_dir,
        best=options.best,
        episodes=options.episodes,
        mode=options.mode,
        record=options.record,
        memory=options.memory,
        deterministic=not options.sample,
        seed=options.seed,
        console=LastingConsole(),
    )
    return 0


def _push(options: argparse.Namespace) -> int:
    from xlstm_rl.hub.push import push_run

    push_run(
        options.run_dir,
        options.repository,
        private=options.private,
        episodes=options.episodes,
        console=LastingConsole(),
    )
    return 0


class _Listed(NamedTuple):
    """Things of a kind, with what a terminal shows beside their names."""

    title: str
    names: Sequence[str]
    columns: Sequence[str] = ()
    describe: Callable[[str], Sequence[str]] = lambda name: ()


def _list(options: argparse.Namespace) -> int:
    import gymnasium

    from xlstm_rl.bench.spec import spec_names
    from xlstm_rl.configs.source import registered_memories
    from xlstm_rl.envs import suite_ids

    own = sorted({key for key in gymnasium.registry if key.startswith("xlstm_rl/")} - set(suite_ids()))
    all_kinds = (
        _Listed("presets", preset_names(), ("memory", "steps", "task"), _preset_cells),
        _Listed("environments", own, ("horizon", "optimum", "best without memory"), _task_cells),
        _Listed("benchmarks", spec_names(), ("tasks", "runs", "agents", "description"), _spec_cells),
        _Listed("memories", registered_memories()),
        _Listed("environments of other packages", suite_ids()),
    )
    kinds = [kind._replace(names=[name for name in kind.names if options.word in name.lower()]) for kind in all_kinds]
    if not any(kind.names for kind in kinds):
        print(f"xlstm-rl: no name has {options.word!r} in it", file=sys.stderr)
        return STOPPED
    console = LastingConsole()
    for kind in kinds:
        if not console.is_terminal:
            # for other programs: names alone, none of them broken
            for name in kind.names:
                say(console, name)
        elif kind.names:
            _show_kind(console, kind)
    return 0


def _show_kind(console: Console, kind: _Listed) -> None:
    if not kind.columns:
        console.print(f"{kind.title}: {', '.join(kind.names)}", highlight=False)
        return
    table = Table(title=kind.title, title_justify="left", title_style="bold")
    table.add_column("name", no_wrap=True)
    for column in kind.columns:
        table.add_column(column)
    for name in kind.names:
        table.add_row(name, *kind.describe(name))
    console.print(table)


def _preset_cells(name: str) -> Sequence[str]:
    config = load(name)
    memory = f"{config.memory.name} {config.memory.settings.get('blocks', '')}"
    return memory.strip(), f"{config.total_steps:,}", config.description or ""


def _task_cells(env_id: str) -> Sequence[str]:
    import gymnasium

    from xlstm_rl.envs import task_facts

    env = gymnasium.make(env_id)
    facts = task_facts(env)
    env.close()
    return ("-",) * 3 if facts is None else [f"{value:.4g}" for value in facts]


def _spec_cells(name: str) -> Sequence[str]:
    from xlstm_rl.bench.spec import load_spec

    spec = load_spec(name)
    runs = len(spec.tasks) * sum(len(spec.seeds_of(agent)) for agent in spec.agents)
    return str(len(spec.tasks)), str(runs), ", ".join(spec.agents), spec.description or ""


def _show(options: argparse.Namespace) -> int:
    print(dump(load(options.name, options.overrides)), end="")
    return 0
