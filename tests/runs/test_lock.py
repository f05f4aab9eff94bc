"""A lock is held by one and ends with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_rl.runs.lock import LockedError, exclusive

HOLDER = """
import sys, time
from pathlib import Path
from xlstm_rl.runs.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_holder_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        for _ in range(2):
            with pytest.raises(LockedError, match=rf"^process {os.getpid()} on \S+$"), exclusive(tmp_path / "lock"):
                pass


def test_lock_is_given_back_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "lock"):
        raise KeyError
    with exclusive(tmp_path / "lock"):
        pass


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} on "), exclusive(lock):
        pass
    holder.kill()
    holder.communicate(timeout=60)
    with exclusive(lock):
        pass


def test_name_of_an_earlier_holder_is_written_over(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("process 12345678901234567890 on a machine with a long name\n", encoding="utf-8")
    with exclusive(lock):
        assert lock.read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
        assert len(lock.read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such calls")
def test_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with exclusive(tmp_path / "lock"), exclusive(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
