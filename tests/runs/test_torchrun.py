"""Training with several processes: one folder, one agent, and nothing lost where a process dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from xlstm_rl import RecurrentPPO
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.returns import read_returns

SMALL = [
    *(
        "tmaze",
        "total_steps=3072",
        "env.n_envs=4",
        "env.kwargs.corridor_length=3",
        "ppo.n_steps=64",
        "ppo.batch_size=128",
    ),
    *("memory.hidden_size=16", "checkpoint.every_steps=512", "eval.every_steps=1024", "eval.interim_episodes=8"),
    *("eval.n_episodes=8", "eval.n_envs=4", "rank_timeout=60"),
]
TRAIN = ["-m", "xlstm_rl", "train"]


def torchrun(*command: str, processes: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *options,
    ]
    everything = [*launcher, *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(everything, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=180)
    return process.returncode, said[-4000:]


def outcome(folder: Path) -> tuple[Any, list[Any]]:
    """Final weights, and the returns without their times."""
    model = RecurrentPPO.load(folder / "model.zip", device="cpu")
    rows = [row._replace(seconds=0.0) for row in read_returns(folder / "returns.csv")]
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach(), rows


def ranks_of(folder: Path) -> list[int]:
    """Process numbers of the ranks that train in a folder, by rank, as Linux tells them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() in command and b"torch.distributed.run" not in command:
                lines = (entry / "environ").read_bytes().split(b"\0")
                variables = dict(line.split(b"=", 1) for line in lines if b"=" in line)
                found[int(variables[b"RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun") / "undisturbed"
    code, said = ended(torchrun(*TRAIN, *SMALL, "--run-dir", str(folder)))
    assert code == 0, said
    assert said.count("run folder") == 1 and said.count("model saved in") == 1, "rank 0 alone speaks"
    return folder


def test_ranks_write_one_folder(undisturbed: Path) -> None:
    checkpoints = [path.name for path in RunFolder(undisturbed).list_checkpoints()]
    assert len(checkpoints) == 3
    assert [path.name for path in sorted((undisturbed / "checkpoints" / "rank1").iterdir())] == checkpoints
    rows = read_returns(undisturbed / "returns.csv")
    # episodes of both ranks: five to nine steps each, in rollouts of 512
    trained = [row.episodes for row in rows if row.kind == "train"]
    assert len(trained) == 6 and min(trained) > 256 // 5
    assert [row.step for row in rows if row.kind == "eval"] == [1024, 2048, 3072]
    model = RecurrentPPO.load(undisturbed / "model.zip", device="cpu")
    assert model.num_timesteps == 3072


def test_rank_that_is_killed_ends_all_and_the_run_goes_on_exactly(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = torchrun(*TRAIN, *SMALL, "--run-dir", str(folder))
    wait_for(lambda: len(list(folder.glob("checkpoints/step_*.zip"))) == 2, process)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    code, said = ended(process)
    assert code != 0 and "rank 0 of 2 lost another rank" in said and "SIGKILL" in said
    code, said = ended(torchrun(*TRAIN, "--resume", str(folder)))
    assert code == 0, said
    weights, rows = outcome(folder)
    expected, expected_rows = outcome(undisturbed)
    assert torch.equal(weights, expected) and rows == expected_rows


@pytest.mark.slow
def test_another_number_of_processes_is_refused_or_starts_new_episodes(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(undisturbed), str(folder)], check=True)
    code, said = ended(torchrun(*TRAIN, "--resume", str(folder), processes=3))
    assert code != 0 and "was trained by 2 process(es), and here are 3" in said and "--new-episodes" in said
    alone = [sys.executable, *TRAIN, "--resume", str(folder), "total_steps=3584"]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 2 and "was trained by 2 process(es), and here are 1" in done.stderr
    done = subprocess.run([*alone, "--new-episodes"], capture_output=True, text=True)
    assert done.returncode == 0 and "new episodes: so it was asked for" in done.stdout, done.stderr
    assert RecurrentPPO.load(folder / "model.zip", device="cpu").num_timesteps == 3584


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_ranks_may_be_killed_at_any_moment(seed: int, undisturbed: Path, tmp_path: Path) -> None:
    """While they start, collect, update, evaluate or save; either by torchrun's own restarts or by hand."""
    chance, folder = random.Random(seed), tmp_path / "killed"
    by_torchrun = seed % 2 == 0
    options = ("--max-restarts=3",) if by_torchrun else ()
    process = torchrun(*TRAIN, *SMALL, "--run-dir", str(folder), options=options)
    kills = 0
    while process.poll() is None and kills < 3:
        wait_for(lambda: (folder / "checkpoints").is_dir() and len(ranks_of(folder)) == 2, process)
        time.sleep(chance.uniform(0, 1.5))
        found = ranks_of(folder)
        if len(found) == 2:
            kind = chance.choice([signal.SIGKILL, signal.SIGTERM]) if not by_torchrun else signal.SIGKILL
            os.kill(chance.choice(found), kind)
            kills += 1
            if not by_torchrun:
                ended(process)
                process = torchrun(*TRAIN, "--resume", str(folder))
            time.sleep(1.0)
    code, said = ended(process)
    assert code == 0, said
    assert torch.equal(outcome(folder)[0], outcome(undisturbed)[0])


@pytest.mark.slow
def test_rank_that_hangs_ends_all_within_the_time_limit(tmp_path: Path) -> None:
    folder = tmp_path / "hanging"
    settings = [text.replace("rank_timeout=60", "rank_timeout=5") for text in SMALL]
    process = torchrun(*TRAIN, *settings, "--run-dir", str(folder))
    wait_for(lambda: any(folder.glob("checkpoints/step_*.zip")), process)
    stopped = ranks_of(folder)[1]
    begun = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_for(lambda: len(ranks_of(folder)) < 2 or time.monotonic() - begun > 60, process)
    finally:
        os.kill(stopped, signal.SIGKILL)
    code, said = ended(process)
    assert code != 0 and "lost another rank" in said
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_rank_that_raises_tells_the_others_why(tmp_path: Path) -> None:
    code, said = ended(torchrun(*TRAIN, *SMALL, "ppo.seq_len=999", "--run-dir", str(tmp_path / "wrong")))
    assert code != 0 and "ppo.seq_len=999" in said
    taken = tmp_path / "taken"
    (taken / "something").mkdir(parents=True)
    code, said = ended(torchrun(*TRAIN, *SMALL, "--run-dir", str(taken)))
    assert code != 0 and "rank 1 of 2 lost another rank: it ended with rank 0: ConfigError: run folder" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_once_and_the_run_goes_on_exactly(kind: signal.Signals, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    process = torchrun(*TRAIN, *SMALL, "--run-dir", str(folder))
    wait_for(lambda: any(folder.glob("checkpoints/step_*.zip")), process)
    process.send_signal(kind)
    _, said = ended(process)
    assert said.count("go on with: xlstm-rl train --resume") == 1, said
    assert ended(torchrun(*TRAIN, "--resume", str(folder)))[0] == 0
    weights, rows = outcome(folder)
    expected, expected_rows = outcome(undisturbed)
    assert torch.equal(weights, expected) and rows == expected_rows


@pytest.mark.slow
def test_two_nodes_do_what_one_does(undisturbed: Path, tmp_path: Path) -> None:
    """Two agents of torchrun on this machine, as on two."""
    folder = tmp_path / "nodes"
    common = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:29519",
        "--rdzv-id=nodes",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *common, *TRAIN, *SMALL, "--run-dir", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "12"
    ]
    for agent in agents:
        code, said = ended(agent)
        assert code == 0, said
    assert torch.equal(outcome(folder)[0], outcome(undisturbed)[0])


def test_restarts_need_a_folder_that_can_be_found_again() -> None:
    done = subprocess.run(
        [sys.executable, *TRAIN, "tmaze"],
        env=os.environ | {"TORCHELASTIC_MAX_RESTARTS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--max-restarts needs --run-dir" in done.stderr
