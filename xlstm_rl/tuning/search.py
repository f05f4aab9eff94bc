"""The search itself: worker processes that do trials until the budget is spent, and one view of them."""

from __future__ import annotations

import multiprocessing
import time
from signal import SIGTERM, Signals

from rich.console import Console

from xlstm_rl.bench.worker import leave_with_the_parent
from xlstm_rl.runs.interruption import Interruption
from xlstm_rl.runs.train import TrainingStoppedError
from xlstm_rl.tuning.report import StudyView, write_report
from xlstm_rl.tuning.space import PORTFOLIO
from xlstm_rl.tuning.study import MemorySize, Tuning, close_lost, memory_size, open_study, run_trial, spent

POLL_SECONDS = 0.5


def tune(tuning: Tuning, *, workers: int = 1, console: Console | None = None) -> Signals | None:
    """Spend what is left of the budget, then write the report; again, it goes on where it stopped.

    Args:
        tuning: the search.
        workers: trials at the same time, each in a process with one torch thread.
        console: shows the trials.

    Returns:
        The signal that interrupted it, if one did; interrupted trials are done again.

    Raises:
        ConfigError: see `open_study`, or the settings cannot be built.
    """
    study = open_study(tuning)
    close_lost(study)
    size = memory_size(tuning.config)
    deadline = None if tuning.minutes is None else time.time() + 60 * tuning.minutes
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(tuning, size, deadline), name=f"trial worker {index}")
        for index in range(workers if spent(study) < tuning.budget else 0)
    ]
    with Interruption() as interruption, StudyView(tuning, study, console or Console(quiet=True)) as view:
        for process in processes:
            process.start()
        told = False
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(POLL_SECONDS / len(processes))
            view.update()
            if interruption.signal is not None and not told:
                told = True
                for process in processes:
                    # Ctrl-C has reached them already, and a second signal would end them unsaved
                    if interruption.signal == SIGTERM and process.is_alive():
                        process.terminate()
    write_report(tuning, study)
    failed = [process for process in processes if process.exitcode not in (0, None)]
    if failed and interruption.signal is None:
        raise TrainingStoppedError(
            f"{failed[0].name} ended with exit code {failed[0].exitcode}; what it wrote is above"
        )
    return interruption.signal


def _work(tuning: Tuning, size: MemorySize, deadline: float | None) -> None:
    """Do trials until the budget is spent; the process of a worker."""
    from optuna.samplers import TPESampler

    leave_with_the_parent()
    study = open_study(tuning)
    while spent(study) < tuning.budget and (deadline is None or time.time() < deadline):
        # seeded anew for each trial: one sampler would begin again with its first draws in every process
        seed = len(study.get_trials(deepcopy=False))
        study.sampler = TPESampler(seed=seed, n_startup_trials=len(PORTFOLIO) + 2, constant_liar=True)
        if run_trial(tuning, size, study, study.ask()) is not None:
            return
