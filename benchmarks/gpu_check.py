"""Checks the GPU kernels and whole agents on this machine's GPU and times them; one command for everybody who has one.

    python -m benchmarks.gpu_check                 # at most 8 minutes; tables at the end, all figures in gpu_check.json
    python -m benchmarks.gpu_check --minutes 3 --json mine.json
    python -m benchmarks.gpu_check --dry-run       # the same program over the torch forms on the CPU, tiny shapes

Needs the source tree, torch with Triton, NumPy and gymnasium; for the agents Stable-Baselines3, sb3-contrib and
safetensors too. Every kernel, width and dtype is a part of its own, done in another process: one that does not compile,
gives wrong numbers, hangs or ends the process is told, and the others go on. The file is written anew after every
part.

Exit code: 0 when everything that can run agrees, 1 when something is wrong or failed, 2 when nothing could be done: no
GPU, no Triton, no time. Times are medians over interleaved rounds, those of kernels by CUDA events, in microseconds. A
dry run says nothing about any GPU: it shows that the program itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.gpu_parts import DTYPES, FAILED, KERNELS, PLANS, RIGHT, SKIPPED, WRONG, Row

NOT_REACHED = "not reached"
# Seconds a part may take; the first of a kernel compiles it.
PART_SECONDS = 120.0
# Processes that check kernels at the same time, since compiling takes the CPU; what is timed is timed alone.
CHECKERS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not reached by then is left out")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where to write all figures")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on the CPU")
    args = parser.parse_args(arguments)
    obstacle = None if args.dry_run else _obstacle()
    if obstacle is not None:
        print(f"{obstacle} Nothing was checked and nothing was timed.")
        return 2
    plan = "dry-run" if args.dry_run else "gpu"
    report = Report(_machine(dry=args.dry_run), args.json)
    print(*(f"{key} {value}" for key, value in report.machine.items()), sep=", ", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", plan]
    checkers = 1 if args.dry_run else max(1, min(CHECKERS, (os.cpu_count() or 1) // 2))
    try:
        run_all(PLANS[plan].parts(), command, report, 60 * args.minutes, checkers)
    except KeyboardInterrupt:
        print("\nStopped; this is what was done until then.")
    return report.close(dry=args.dry_run)


def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "No GPU: torch.cuda.is_available() is false."
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)."
    return None


def _machine(*, dry: bool) -> dict[str, str]:
    here = {"python": sys.version.split()[0], "torch": torch.__version__}
    if dry:
        return {"gpu": "none (dry run)", **here}
    return {
        "gpu": torch.cuda.get_device_name(),
        **here,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": import_module("triton").__version__,
    }


class Report:
    """Rows as they come in, on the terminal and in a file, and the tables at the end."""

    def __init__(self, machine: dict[str, str], path: Path) -> None:
        self.machine, self.path = machine, path
        self.rows: list[Row] = []
        self._lock = threading.Lock()

    def add(self, part: str, rows: list[Row], seconds: float) -> None:
        """Note what a part gave."""
        with self._lock:
            self.rows += rows
            counts = Counter(row["status"] for row in rows)
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            print(f"{seconds:6.1f} s  {part:36s} {told}", flush=True)
            whole = json.dumps({**self.machine, "rows": self.rows}, indent=1) + "\n"
            beside = self.path.with_name(self.path.name + ".part")
            with beside.open("w", encoding="utf-8") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)

    def close(self, *, dry: bool) -> int:
        """Print the tables and what they mean; the exit code."""
        _print_checks([row for row in self.rows if row["part"].startswith("check ")])
        _print_figures([row for row in self.rows if not row["part"].startswith("check ")])
        _print_problems(self.rows)
        counts = Counter(row["status"] for row in self.rows)
        bad = counts[WRONG] + counts[FAILED]
        print(f"\nAll figures are in {self.path}.")
        if counts[NOT_REACHED]:
            print(f"{counts[NOT_REACHED]} parts were not reached in time: give more with --minutes.")
        if counts[RIGHT] + bad == 0:
            print("Nothing was checked and nothing was timed.")
            return 2
        print(f"{bad} cases are WRONG or FAILED: please report this output." if bad else "All that ran is right.")
        if dry:
            print("This was a dry run of the torch forms on the CPU: no GPU kernel ran.")
        return 1 if bad else 0


class Worker:
    """A process that does parts, replaced when it ends or hangs."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()
        self.log: IO[str] | None = None
        self.reader: threading.Thread | None = None

    def do(self, part: str, seconds: float) -> list[Row]:
        """The rows of a part; one that says why, where there are none."""
        fresh = self.process is None or self.process.poll() is not None
        rows = self._ask(part, seconds)
        if rows is None and not fresh:
            # what the part before has left behind may have ended it
            rows = self._ask(part, seconds)
        return [_row(part, FAILED, f"ended the process: {self._last_words()}")] if rows is None else rows

    def _ask(self, part: str, seconds: float) -> list[Row] | None:
        """The rows, or None where the process ended."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None, "it has been started"
        try:
            self.process.stdin.write(part + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=seconds)
        except BrokenPipeError:
            answer = ""
        except queue.Empty:
            self.stop()
            return [_row(part, FAILED, f"took longer than {seconds:.0f} seconds")]
        if not answer:
            self.process.wait()
            return None
        rows: list[Row] = json.loads(answer)
        return rows

    def _start(self) -> None:
        self.stop()
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, encoding="utf-8"
        )
        self.answers = queue.Queue()
        self.reader = threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True)
        self.reader.start()

    def _last_words(self) -> str:
        code = None if self.process is None else self.process.returncode
        if self.log is None:
            return f"exit code {code}"
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return f"exit code {code}" + (f", {lines[-1]:.200}" if lines else "")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None and self.reader is not None:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            # what was never read is lost
            with suppress(OSError):
                self.process.stdin.close()  # type: ignore[union-attr]
        if self.log is not None:
            self.log.close()
        self.process = self.log = None


def _forward(lines: IO[str], answers: queue.Queue[str]) -> None:
    with lines:
        for line in lines:
            answers.put(line)
    answers.put("")


def run_all(parts: Iterable[str], command: list[str], report: Report, seconds: float, checkers: int = 1) -> None:
    """Do all parts within a time: checks in several processes, what is timed in one, nothing beside it.

    Args:
        parts: their names.
        command: starts a process that does parts, see `gpu_parts.serve`.
        report: gets the rows.
        seconds: after which no part begins, and none goes on.
        checkers: processes that check.
    """
    parts, deadline = list(parts), time.monotonic() + seconds
    workers: queue.Queue[Worker] = queue.Queue()
    every = [Worker(command) for _ in range(checkers)]
    for worker in every:
        workers.put(worker)

    def do(part: str) -> None:
        begun = time.monotonic()
        left = deadline - begun
        if left <= 0:
            report.add(part, [_row(part, NOT_REACHED, f"{seconds / 60:.3g} minutes were over")], 0.0)
            return
        worker = workers.get()
        try:
            rows = worker.do(part, min(PART_SECONDS, left))
        finally:
            workers.put(worker)
        report.add(part, rows, time.monotonic() - begun)

    pool = ThreadPoolExecutor(checkers)
    try:
        for _ in pool.map(do, [part for part in parts if part.startswith("check ")]):
            pass
        for part in parts:
            if not part.startswith("check "):
                do(part)
    finally:
        # the threads wait for answers, which then come
        deadline = 0.0
        for worker in every:
            worker.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _row(part: str, status: str, problem: str) -> Row:
    kind, *rest = part.split()
    named: dict[str, Any] = dict(zip(("kernel", "width", "dtype"), rest, strict=True)) if kind == "check" else {}
    return {"part": part, **named, "status": status, "problem": problem}


def _print_checks(rows: list[Row]) -> None:
    """A line per kernel and width: the largest error in each dtype, or what is the matter."""
    print(f"\n{'kernel':16s} {'width':>5s}" + "".join(f"  {dtype:>14s}" for dtype in DTYPES))
    widths = sorted({int(row["width"]) for row in rows})
    for kernel in KERNELS:
        for width in widths:
            cells = []
            for dtype in DTYPES:
                found = [r for r in rows if (r["kernel"], int(r["width"]), r["dtype"]) == (kernel, width, dtype)]
                cells.append(_verdict(found))
            print(f"{kernel:16s} {width:5d}" + "".join(f"  {cell:>14s}" for cell in cells))


def _verdict(rows: list[Row]) -> str:
    statuses = {row["status"] for row in rows}
    for status in (FAILED, WRONG, NOT_REACHED, SKIPPED):
        if status in statuses:
            return status
    return f"{max(row['error'] for row in rows):.1e}" if rows else "-"


def _print_figures(rows: list[Row]) -> None:
    """What was timed, a line each."""
    for row in rows:
        names = ("n_envs", "device", "way", "what", "B", "T", "H", "D", "dtype", "contender")
        known = [(name, row[name]) for name in names if name in row]
        told = " ".join(f"{name} {value}" if isinstance(value, int) else str(value) for name, value in known)
        figures = [
            f"{name} {value:,.1f}" for name, value in row.items() if isinstance(value, float) and row["status"] == RIGHT
        ]
        print(f"{row['part'].split()[0]:9s} {told or row['part']:52s} {'  '.join(figures) or row['status']}")


def _print_problems(rows: list[Row]) -> None:
    """Every reason once, with the parts that it is of."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != RIGHT:
            by_reason.setdefault((row["status"], row["problem"]), []).append(row["part"])
    for (status, problem), parts in by_reason.items():
        distinct = list(dict.fromkeys(parts))
        more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
        print(f"{status}: {', '.join(distinct[:3])}{more}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
