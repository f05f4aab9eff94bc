"""Files of a run that are damaged, missing or cannot be written: told in a sentence, and nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from stable_baselines3.common.vec_env import VecNormalize

from tests.runs.test_resuming import SMALL, rows, small, weights
from xlstm_rl import cli
from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.configs import ConfigError, load_file
from xlstm_rl.runs.build import make_env
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.open import open_run
from xlstm_rl.runs.returns import Returns, Row, pack_rows, read_returns, unpack_rows
from xlstm_rl.runs.scores import show_scores
from xlstm_rl.runs.train import RunResult, TrainingStoppedError, resume, train

# Short, with normalised observations.
SHORT = [
    *("total_steps=96", "env.normalize_observation=true", "ppo.n_steps=16", "ppo.batch_size=24", "ppo.n_epochs=1"),
    *("checkpoint.every_steps=45", "eval.n_episodes=1", "eval.interim_episodes=1", "eval.every_steps=45"),
]
COMMAND = ["train", "cartpole-no-velocity", *SMALL, *SHORT]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(small(*SHORT), tmp_path_factory.mktemp("runs") / "run")


def copied(run: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder, tmp_path / "run"))


def resumed(folder: Path, *overrides: str) -> tuple[RunResult, str]:
    """What resuming made, and said."""
    stream = io.StringIO()
    result = resume(folder, overrides, console=Console(file=stream, width=400))
    return result, stream.getvalue()


def flip(path: Path, random: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


READ = ["config.yaml", "returns.csv", "model.zip", "best.zip", "checkpoints/*", "tensorboard/*"]
FILES = [*READ, "versions.json", "lock", "curve.png"]
SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in FILES if name not in READ]


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_in_a_file_is_refused_or_harmless_to_evaluation(run: RunResult, name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(sum(name.encode()))
    folder, whole = copied(run, tmp_path), [weights(run.folder / file) for file in ("model.zip", "best.zip")]
    for _ in range(5):
        path = sorted(folder.glob(name))[-1]
        content = path.read_bytes()
        flip(path, random)
        for best in (False, True):
            try:
                with open_run(folder, best=best) as opened:
                    opened.model.save(tmp_path / "again")
                    assert opened.config == load_file(run.folder / "config.yaml")
            except ConfigError:
                continue
            assert weights(tmp_path / "again.zip") == whole[best]
        path.write_bytes(content)


@pytest.mark.parametrize("name", [*READ, *SELDOM])
def test_flipped_bit_in_a_file_is_refused_or_harmless_to_resuming(run: RunResult, name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(sum(name.encode()))
    for attempt in range(3):
        folder = Path(shutil.copytree(run.folder, tmp_path / f"run{attempt}"))
        flip(sorted(folder.glob(name))[-1], random)
        try:
            result, _ = resumed(folder)
        except ConfigError:
            continue
        assert rows(folder) == rows(run.folder)
        assert result.rows == read_returns(folder / "returns.csv")
        assert weights(folder / "model.zip") == weights(run.folder / "model.zip")


@pytest.mark.parametrize("place", range(0, 900, 37))
def test_changed_configuration_of_a_run_is_refused(run: RunResult, place: int, tmp_path: Path) -> None:
    folder = RunFolder(copied(run, tmp_path))
    content = bytearray(folder.config.read_bytes())
    content[place % len(content)] ^= 1
    folder.config.write_bytes(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        folder.load_config()


def test_configuration_without_its_checksum_is_taken_as_it_is(run: RunResult, tmp_path: Path) -> None:
    folder = RunFolder(copied(run, tmp_path))
    text = folder.config.read_text(encoding="utf-8")
    folder.config.write_text("".join(text.splitlines(keepends=True)[:-1]).replace("seed: 0", "seed: 7"))
    assert folder.load_config().seed == 7


@pytest.mark.parametrize("share", (0.1, 0.5, 0.8, 0.95))
@pytest.mark.parametrize("end", ("line", "middle"))
def test_configuration_that_was_cut_off_is_refused(run: RunResult, share: float, end: str, tmp_path: Path) -> None:
    folder = RunFolder(copied(run, tmp_path))
    lines = folder.config.read_bytes().splitlines(keepends=True)[:-1]
    kept = b"".join(lines[: int(share * len(lines))])
    folder.config.write_bytes(kept if end == "line" else kept[:-2])
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        folder.load_config()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        resumed(folder.path)


def test_last_number_of_a_configuration_that_was_cut_off_is_not_taken(run: RunResult, tmp_path: Path) -> None:
    folder = RunFolder(copied(run, tmp_path))
    folder.config.write_bytes(folder.config.read_bytes().rpartition(b"\n#")[0][:-3])
    with pytest.raises(ConfigError, match="no checksum line and ends within a line"):
        folder.load_config()


@pytest.mark.parametrize("setting", ("seed: 0\n", "  n_steps: 16\n"))
def test_configuration_without_its_checksum_and_a_setting_names_it(
    run: RunResult, setting: str, tmp_path: Path
) -> None:
    folder = RunFolder(copied(run, tmp_path))
    text = folder.config.read_text(encoding="utf-8")
    assert setting in text
    folder.config.write_text("".join(text.splitlines(keepends=True)[:-1]).replace(setting, ""))
    with pytest.raises(ConfigError, match=rf"no checksum line and lacks (ppo\.)?{setting.split(':')[0].strip()},? "):
        folder.load_config()


def torn(content: bytes) -> bytes:
    return content[:-9]


def shorter(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:2])


def zeros(content: bytes) -> bytes:
    return content[:-30] + bytes(30)


def empty(content: bytes) -> bytes:
    return b""


def nonsense(content: bytes) -> bytes:
    return b"\xff\xfe" * 40 + content


DAMAGES: list[Callable[[bytes], bytes]] = [torn, shorter, zeros, empty, nonsense]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_returns_are_told_and_mended(run: RunResult, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    path = folder / "returns.csv"
    path.write_bytes(damage(path.read_bytes()))
    result, said = resumed(folder)
    assert "returns.csv is damaged" in said
    assert "it is written anew from the checkpoint" in said
    assert result.rows == run.rows == read_returns(path)


def test_missing_returns_are_told_and_mended(run: RunResult, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (folder / "returns.csv").unlink()
    assert f"{len(run.rows)} rows of it are missing" in resumed(folder)[1]
    assert rows(folder) == rows(run.folder)


def test_sound_returns_are_not_spoken_of(run: RunResult, tmp_path: Path) -> None:
    assert "damaged" not in resumed(copied(run, tmp_path))[1]


def count_rows(self: RecurrentPPO, path: Any, notes: dict[str, Any]) -> None:
    """As the first versions did it: the checkpoint tells how many rows of the CSV are its own."""
    save_checkpoint(self, path, {key: notes[key] for key in ("seconds", "log")} | {"rows": len(notes["rows"])})


save_checkpoint = RecurrentPPO.save_checkpoint


@pytest.mark.parametrize("lost", [0, 1])
def test_checkpoint_that_counts_rows_is_resumed_with_those_that_are_left(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecurrentPPO, "save_checkpoint", count_rows)
    folder = train(small(*SHORT), tmp_path / "run").folder
    monkeypatch.undo()
    before = read_returns(folder / "returns.csv")
    if lost:
        (folder / "returns.csv").write_bytes(torn((folder / "returns.csv").read_bytes()))
    result, said = resumed(folder)
    assert result.rows == before[: len(before) - lost]
    assert ("1 rows of it are missing; they are lost" in said) == bool(lost)


@pytest.mark.parametrize("damage", [torn, empty], ids=lambda damage: damage.__name__)
def test_lost_events_are_told(run: RunResult, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (path,) = (folder / "tensorboard").iterdir()
    assert "TensorBoard" not in resumed(folder)[1]
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} lacks events from before the checkpoint" in resumed(folder)[1]
    path.unlink()
    assert f"{path} lacks events from before the checkpoint" in resumed(folder)[1]


def test_rows_and_events_are_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    sync = os.fsync

    def note(number: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell the names of open files")
    monkeypatch.setattr("os.fsync", note)
    train(small(*SHORT), tmp_path / "run")
    first = next(index for index, name in enumerate(flushed) if name.startswith(".step_"))
    assert flushed[first - 2] == "returns.csv"
    assert flushed[first - 1].startswith("events.out.tfevents.")
    assert flushed[first + 1] == "checkpoints"


def test_checkpoint_of_somebody_else_in_a_run_folder_is_refused_by_name(run: RunResult, tmp_path: Path) -> None:
    folder = RunFolder(copied(run, tmp_path))
    *_, last = folder.list_checkpoints()
    env = VecNormalize(make_env(folder.load_config(), 3, 0))
    RecurrentPPO.load(last, env).save_checkpoint(last)
    assert f"{last.name} cannot be used: {last} is no checkpoint of a run folder" in resumed(folder.path)[1]


def test_rows_are_packed_exactly() -> None:
    packed = [Row("train", 2**40, 1.1, 3, 0.1 + 0.2, None), Row("eval", 7, 0.0, 1, float("-inf"), 1 / 3)]
    assert unpack_rows(pack_rows(packed)) == packed
    assert unpack_rows(pack_rows([])) == []
    with pytest.raises(ValueError, match="no rows"):
        unpack_rows(np.zeros((2, 5)))


def test_unfinished_files_of_a_killed_run_are_removed_when_it_goes_on(run: RunResult, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    here = f"{socket.gethostname().replace('.', '-')}@{os.getppid()}.1a2b3c4d.part"
    for name in (".model.zip", "checkpoints/.step_0000000096.zip"):
        # of an earlier version; of another machine, such as a container that is gone; of a number that another got
        for writer in ("1a2b3c4d.part", "elsewhere@1.1a2b3c4d.part", here):
            (folder / f"{name}.{writer}").touch()
    exporting = folder / f".policy.onnx.{here}"
    exporting.touch()
    resume(folder)
    assert list(folder.rglob("*.part")) == [exporting], "its writer lives"


def fails(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "there")

    return fail


def written_to(*names: str) -> Callable[[Path], None]:
    """Folders stand where files are to be written."""

    def block(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)
            (folder / name / "in the way").mkdir(parents=True)

    return block


def file_as_folder(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").touch()


COMMANDS: dict[str, tuple[list[str], Callable[[Path], None]]] = {
    "evaluate, model": (["evaluate", "RUN"], written_to("model.zip", "checkpoints/step_0000009999.zip")),
    "evaluate, best": (["evaluate", "RUN", "--best"], written_to("best.zip")),
    "evaluate, configuration": (["evaluate", "RUN"], written_to("config.yaml")),
    "inspect": (["inspect", "RUN", "--max-steps", "3"], written_to("inspection.png")),
    "export": (["export", "RUN"], written_to("policy.onnx")),
    "resume, returns": (["train", "--resume", "RUN"], written_to("returns.csv")),
    "resume, lock": (["train", "--resume", "RUN"], written_to("lock")),
    "resume, curve": (["train", "--resume", "RUN"], written_to("curve.png")),
    "resume, model": (["train", "--resume", "RUN"], written_to("model.zip")),
    "resume, events": (
        ["train", "--resume", "RUN"],
        file_as_folder,
    ),
    "render": (["bench", "render", "RUN"], written_to("results.json")),
    "compare": (["bench", "compare", "RUN", "RUN"], written_to("results.json")),
    "bench": (["bench", "run", "quick", "--out", "RUN"], written_to("lock")),
    "train": (["train", "cue-recall", "--run-dir", "RUN/lock/deeper"], lambda folder: None),
    "preset": (["train", "RUN/other.yaml"], written_to("other.yaml")),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_file_that_cannot_be_opened_is_told_in_a_sentence(
    run: RunResult, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, block = COMMANDS[case]
    folder = copied(run, tmp_path)
    block(folder)
    before = {path: path.read_bytes() for path in folder.glob("checkpoints/*.zip") if path.is_file()}
    code = cli.main([text.replace("RUN", str(folder)) for text in arguments])
    said = capsys.readouterr().err
    assert code in (cli.STOPPED, cli.USAGE_ERROR)
    assert said.startswith("xlstm-rl: ")
    assert str(folder) in said
    assert {path: path.read_bytes() for path in before} == before


PLACES = {
    "checkpoint": "xlstm_rl.agents.checkpoint.os.replace",
    "last model": "xlstm_rl.runs.folder.RunFolder.save",
    "curve": "xlstm_rl.runs.curve.write_whole",
    "returns": "xlstm_rl.runs.returns.write_whole",
    "row": "xlstm_rl.runs.returns.Returns.add",
    "configuration": "xlstm_rl.runs.folder.write_whole",
    "events": "xlstm_rl.runs.trackers.configure",
}


@pytest.mark.parametrize(
    ("place", "number"),
    [*((place, errno.ENOSPC) for place in PLACES), *(("row", other) for other in (errno.EROFS, errno.EDQUOT))],
)
def test_full_disk_is_told_wherever_it_is_met(
    run: RunResult, place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(run, tmp_path)
    kept = RunFolder(folder).list_checkpoints()
    monkeypatch.setattr(PLACES[place], fails(number))
    with pytest.raises(TrainingStoppedError, match=rf"{os.strerror(number)}.*\n.*step_0000000\d+.zip is kept; once"):
        resume(folder, ["total_steps=144"])
    monkeypatch.undo()
    assert RunFolder(folder).list_checkpoints()[: len(kept)] == kept
    assert resume(folder, ["total_steps=144"]).rows[-1].step == 144
    assert not list(folder.rglob("*.part"))


def test_error_of_an_environment_is_no_fault_of_the_disk(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such file", "/a/level/of/the/game")

    monkeypatch.setattr("gymnasium.envs.classic_control.CartPoleEnv.step", lost)
    with pytest.raises(TrainingStoppedError, match="environment 0 failed.*the/game"):
        resume(copied(run, tmp_path), ["total_steps=144"])


@pytest.mark.parametrize("failures", [1, 3])
def test_run_whose_checkpoint_is_replaced_while_it_is_opened_is_read_again(
    failures: int, run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(run, tmp_path)
    gone = [folder / "checkpoints" / f"step_{number}.zip" for number in range(failures)]
    latest = RunFolder.latest_model
    monkeypatch.setattr(RunFolder, "latest_model", lambda self: gone.pop() if gone else latest(self))
    with open_run(folder) as opened:
        assert opened.model.num_timesteps == 96
    assert not gone


def test_model_and_normalisation_are_of_one_file_however_often_it_is_replaced(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(copied(run, tmp_path))
    load = RecurrentPPO.load

    def replaced_before(*arguments: Any, **keywords: Any) -> Any:
        shutil.copy(folder.list_checkpoints()[0], tmp_path / "other.zip")
        os.replace(tmp_path / "other.zip", folder.model)
        return load(*arguments, **keywords)

    monkeypatch.setattr(RecurrentPPO, "load", replaced_before)
    with open_run(folder.path) as opened:
        assert opened.model.num_timesteps == 96


def test_checkpoint_that_somebody_removed_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = RunFolder.list_checkpoints
    monkeypatch.setattr(RunFolder, "list_checkpoints", lambda self: [self.checkpoints / "step_0.zip", *listed(self)])
    assert train(small(*SHORT, "checkpoint.keep=1"), tmp_path / "run").interrupted_by is None


@contextmanager
def unread() -> Iterator[None]:
    """Standard output is a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", output)
        yield
        # what a program does at its end
        output.flush()


def test_training_goes_on_when_nobody_reads_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with unread():
        assert cli.main([*COMMAND, "--run-dir", str(tmp_path / "run")]) == 0
    assert "nobody reads the output any more; it goes on without" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.zip").is_file()


@pytest.mark.parametrize("arguments", [["show", "tmaze"], ["list"]])
def test_other_commands_end_when_nobody_reads_their_output(arguments: list[str]) -> None:
    with unread():
        assert cli.main(arguments) in (0, cli.STOPPED)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_closing_table_is_shown_on_any_terminal(
    encoding: str, run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "Läufe"))
    for arguments in (["evaluate", str(folder)], ["train", "--resume", str(folder)]):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        assert cli.main(arguments) == 0
        shown = raw.getvalue().decode(encoding)
        assert "trained agent" in shown and "random actions" in shown
        assert ("±" in shown) == (encoding != "ascii")


def test_closing_table_is_shown_by_a_console_of_ones_own_that_knows_few_characters(run: RunResult) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=100)
    show_scores(console, run.scores, "Läufe")
    assert b"+-" in raw.getvalue() and b"L\\xe4ufe" in raw.getvalue()


def test_rows_are_read_up_to_the_one_that_is_being_written(tmp_path: Path) -> None:
    returns = Returns(tmp_path / "returns.csv")
    returns.add(Row("train", 10, 1.0, 2, 0.5, None))
    with (tmp_path / "returns.csv").open("a") as file:
        file.write("train,20,2.0,2,0.7,")
    assert read_returns(tmp_path / "returns.csv") == returns.rows
    assert read_returns(tmp_path / "none.csv") == []
