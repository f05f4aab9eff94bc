"""An exported C file, compiled here, beside the policy it was made of."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from xlstm_rl.export.onnx_file import ExportError
from xlstm_rl.export.step_check import ROWS, Check, compare_steps
from xlstm_rl.export.step_graph import NEXT, RESET

_FLAGS = ("-std=c99", "-O3", "-Wall", "-Wextra", "-pedantic", "-Werror")
_NUMBERS = {
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "uint8_t": ctypes.c_uint8,
    "int8_t": ctypes.c_int8,
    "int16_t": ctypes.c_int16,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}


def compiler() -> str | None:
    """The path of this machine's C compiler: what CC names, or cc, gcc or clang; None without any."""
    found = (shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    return next((path for path in found if path is not None), None)


def read_facts_of_c(path: Path | str) -> dict[str, Any]:
    """What the comment at the head of an exported C file says: see `export_c`."""
    text = Path(path).read_text()
    facts: dict[str, Any] = json.loads(text[text.index("{") : text.index("*/")])
    return facts


def check_c(
    model: BaseAlgorithm, path: Path | str, *, action_masks: bool | None = None, n_steps: int = 200, seed: int = 0
) -> Check:
    """Compile an exported policy and run it beside torch with random observations, resets and masks.

    With weights of int8 any error is allowed that is a number: how large it is depends on the agent.

    Args:
        model: the agent that was exported.
        path: of the C file.
        action_masks: as for `export_onnx`.
        n_steps: steps to compare.
        seed: of observations, resets and masks.

    Raises:
        ExportError: there is no compiler, it does not take the file, or an output is off by more than `TOLERANCE`.
    """
    with TemporaryDirectory() as folder:
        runner = _CRunner(Path(path), Path(folder))
        options: dict[str, Any] = {"tolerance": None} if runner.int8 else {}
        return compare_steps(model, runner, action_masks=action_masks, n_steps=n_steps, seed=seed, **options)


def time_c(path: Path | str) -> str:
    """What the program at the end of an exported C file prints here: the time of a step, and bytes.

    Raises:
        ExportError: there is no compiler, or it does not take the file.
    """
    path = Path(path)
    with TemporaryDirectory() as folder:
        program = Path(folder) / "policy"
        _compile(path, program, f"-D{read_facts_of_c(path)['c']['prefix'].upper()}_MAIN")
        return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.strip()


def _compile(path: Path, target: Path, *flags: str) -> None:
    command = compiler()
    if command is None:
        raise ExportError("C files are compiled to be checked: install gcc or clang, or name your compiler in CC")
    call = [command, *_FLAGS, *flags, str(path), "-lm", "-o", str(target)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{command} does not take {path}: {done.stderr.strip()[:500]}")


class _CRunner:
    """A C file as a library, with a state for every environment; a `StepRunner`.

    Args:
        path: of the C file.
        folder: for the library, which must stay until the runner is gone.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        library = folder / "policy.so"
        _compile(path, library, "-shared", "-fPIC")
        told = read_facts_of_c(path)["c"]
        self.int8: bool = told["int8"]
        self.inputs: set[str] = {RESET, *(field["of"] for field in told["input"])}
        self._fields = {kind: told[kind] for kind in ("state", "input", "output")}
        structs = {kind: _struct(kind, fields) for kind, fields in self._fields.items()}
        self._rows = [{kind: struct() for kind, struct in structs.items()} for _ in range(ROWS)]
        for row in self._rows:
            # a step with reset must not mind
            ctypes.memset(ctypes.byref(row["state"]), 0xFF, ctypes.sizeof(row["state"]))
        self._step = getattr(ctypes.CDLL(str(library)), f"{told['prefix']}_step")
        self._step.restype = None

    def run(self, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `StepRunner.run`."""
        for index, row in enumerate(self._rows):
            for field in self._fields["input"]:
                array = _array_of(row["input"], field)
                array[...] = fed[field["of"]][index]
            state, given, output = (ctypes.byref(row[kind]) for kind in ("state", "input", "output"))
            self._step(state, given, int(fed[RESET][index]), output)
        told = [
            (mark + field["of"], kind, field)
            for kind, mark in (("output", ""), ("state", NEXT))
            for field in self._fields[kind]
            if field["of"]
        ]
        return {
            name: np.stack([_array_of(row[kind], field).copy() for row in self._rows]) for name, kind, field in told
        }


def _struct(kind: str, fields: list[dict[str, Any]]) -> type[ctypes.Structure]:
    """A struct of the file."""
    members = [(field["name"], _NUMBERS[field["type"]] * math.prod(field["shape"])) for field in fields]
    return type(kind, (ctypes.Structure,), {"_fields_": members})


def _array_of(struct: ctypes.Structure, field: dict[str, Any]) -> np.ndarray:
    """A field of a struct, in its shape, as an array that shares its memory."""
    array: np.ndarray = np.ctypeslib.as_array(getattr(struct, field["name"])).reshape(field["shape"])
    return array
