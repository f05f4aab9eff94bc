"""Writing a policy as one C file: weights, a state that the caller owns, and a function that takes one step.

It is made from the same traced step as the ONNX file, operator by operator, so that there is no second definition of
the blocks, and whatever consists of the same operators is written too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from xlstm_rl._version import __version__
from xlstm_rl.agents.actor_critic import evaluating
from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.export.c_operators import C_TYPES, FUNCTIONS, Buffer, Lowering, Statement, literal, whole
from xlstm_rl.export.onnx_file import (
    ExportError,
    describe_step,
    example_inputs,
    masks_wanted,
    memory_policy,
    quiet_exporter,
)
from xlstm_rl.export.preprocessing import front_of, without
from xlstm_rl.export.step_graph import NEXT, RESET, PolicyStep

_LARGEST_INT8 = 127
_PER_LINE = 12
# Of the loop of `main`.
_TIMED_STEPS = 2000


class _Field(NamedTuple):
    """An entry of a struct of the C file."""

    name: str
    """In C."""
    stands_for: str
    """Name of the input, output or state as in the ONNX file; empty for what is forgotten after a step."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Without the batch."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _Traced(NamedTuple):
    """The statements of a step, and what they read and write."""

    statements: list[Statement]
    constants: list[Buffer]
    inputs: list[_Field]
    state: list[_Field]
    outputs: list[_Field]


def export_c(
    model: BaseAlgorithm, path: Path | str, *, int8: bool = False, action_masks: bool | None = None
) -> dict[str, Any]:
    """Write one step of an agent as a C99 file that needs nothing but the C library, and allocates nothing.

    The actor is written, not the critic. The file is written whole or not at all.

    Args:
        model: an agent with an `XLSTMPolicy`.
        path: of the file; its name without the ending begins the names of what it defines.
        int8: weights of matrix products as int8 with a float32 scale for each row; everything else stays float32.
        action_masks: as for `export_onnx`.

    Returns:
        What the comment at the head of the file says, as for `export_onnx`; "c" holds the fields of the structs.

    Raises:
        ExportError: the agent has no memory policy, or consists of operators that have no form in C here.
        ValueError: actions of this kind cannot be masked.
    """
    policy, path = memory_policy(model), Path(path)
    prefix = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    if not re.match(r"[A-Za-z_]", prefix):
        raise ExportError(f"{path.name} cannot begin names of C: use a name that starts with a letter, as policy.c")
    if any(weight.dtype != torch.float32 for weight in policy.parameters()):
        raise ExportError(
            "C files compute in float32, and this policy has weights of another type: call .float() on it"
        )
    front = without(front_of(model.get_env(), policy.observation_space), policy.unseen_keys)
    step = PolicyStep(policy, front, masked=masks_wanted(model, action_masks))
    # a state belongs to one environment
    examples = tuple(tensor[:1] for tensor in example_inputs(step, front))
    with evaluating(policy), quiet_exporter():
        step.eval()
        program = torch.export.export(step, examples, strict=False).run_decompositions()
        traced = _lower(step, program, int8=int8)
    facts = describe_step(step, front)
    facts["value"] = None
    kept = {field.stands_for for field in traced.state}
    facts["state"] = {name: leaf for name, leaf in facts["state"].items() if name in kept}
    scratch, places = _scratch(traced.statements)
    structs = {"state": [*traced.state, *scratch], "input": traced.inputs, "output": traced.outputs}
    facts["c"] = {
        "prefix": prefix,
        "int8": int8,
        **{kind: [_told(field) for field in fields] for kind, fields in structs.items()},
    }
    source = _source(prefix, traced, structs, places, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, source.encode())
    return facts


def _lower(step: PolicyStep, program: torch.export.ExportedProgram, *, int8: bool) -> _Traced:
    """Statements for what the action and the states behind it need."""
    graph, signature = program.graph, program.graph_signature
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = dict(
        zip(
            [spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT],
            step.inputs,
            strict=True,
        )
    )
    results = dict(zip(step.outputs, graph.output_node().args[0], strict=True))
    wanted, needed = _needed(step, results, given)
    lowering = Lowering(int8=int8)
    values: dict[fx.Node, Any] = {}
    inputs: list[_Field] = []
    state: list[_Field] = []
    outputs: list[_Field] = []
    names: dict[str, set[str]] = {"constant": set(), "input": set(), "state": set(), "output": set()}
    parameters = {spec.arg.name: spec.target for spec in signature.input_specs if spec.kind != InputKind.USER_INPUT}
    for node in placeholders:
        if node not in needed:
            continue
        seen: Tensor = node.meta["val"]
        if node.name in parameters:
            values[node] = lowering.constant(
                _c_name(node.name, names["constant"]), _parameter(program, str(parameters[node.name]))
            )
            continue
        name = given[node.name]
        owner = "state" if name in step.state_leaves else "input"
        field = _Field(_c_name(name, names[owner]), name, seen.dtype, tuple(seen.shape[1:]))
        place = RESET
        if name != RESET:
            (state if owner == "state" else inputs).append(field)
            place = f"{owner}->{field.name}"
        values[node] = whole(Buffer(place, seen.dtype, seen.numel()), seen.shape)
    for node in graph.nodes:
        if node.op != "call_function" or node not in needed:
            continue
        if node.target.__name__ == "getitem":
            values[node] = values[node.args[0]][node.args[1]]
            continue
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        values[node] = lowering.lower(node.target, args, kwargs, node.meta.get("val"))
    # all are in scratch memory before the first is written, as one state may be made of another
    made = {name: lowering.kept(values[results[name]]) for name in wanted}
    fields = {field.stands_for: field for field in state}
    for name, value in made.items():
        owner, leaf = "state", name.removeprefix(NEXT)
        if leaf in fields:
            field = fields[leaf]
        else:
            field, owner = (
                _Field(_c_name(name, names["output"]), name, value.dtype, tuple(value.view.shape[1:])),
                "output",
            )
            outputs.append(field)
        lowering.write_to(Buffer(f"{owner}->{field.name}", value.dtype, field.size), value)
    return _Traced(lowering.statements, lowering.constants, inputs, state, outputs)


def _needed(step: PolicyStep, results: dict[str, fx.Node], given: dict[str, str]) -> tuple[list[str], set[fx.Node]]:
    """Outputs and nodes behind the action; the critic, and a memory of its own, are not among them."""
    wanted = [name for name in step.outputs if name != "value" and not name.startswith(NEXT)]
    needed: set[fx.Node] = set()
    open_nodes = [results[name] for name in wanted]
    while open_nodes:
        node = open_nodes.pop()
        if node in needed:
            continue
        needed.add(node)
        open_nodes += node.all_input_nodes
        following = NEXT + given.get(node.name, "") if node.op == "placeholder" else ""
        if following in results:
            wanted.append(following)
            open_nodes.append(results[following])
    return [name for name in step.outputs if name in wanted], needed


def _parameter(program: torch.export.ExportedProgram, target: str) -> Tensor:
    held = {**program.constants, **program.state_dict}
    value: Tensor = held[target]
    return value


def _c_name(name: str, taken: set[str]) -> str:
    """A name of C for one of the graph, which nothing else of its kind has."""
    short = re.sub(r"\W", "_", re.sub(r"^(p|b|c)_(policy_)?(memory_)?", "", name), flags=re.ASCII)
    free = short
    while free in taken:
        free += "_"
    taken.add(free)
    return free


def _told(field: _Field) -> dict[str, Any]:
    return {"name": field.name, "of": field.stands_for, "type": C_TYPES[field.dtype], "shape": field.shape}


def _source(
    prefix: str,
    traced: _Traced,
    structs: dict[str, list[_Field]],
    places: list[tuple[str, torch.dtype, int]],
    facts: dict[str, Any],
) -> str:
    """The whole file."""
    constants = [text for buffer in traced.constants for text in _constant(buffer)]
    weights = sum(_bytes(buffer) for buffer in traced.constants)
    # what JSON spells "\/" and "/" is the same, and the first ends no comment
    told = ",\n".join(f'"{key}": {json.dumps(fact)}' for key, fact in facts.items()).replace("*/", "*\\/")
    remarks = {
        "state": "Memory of one environment, which a step with reset_now fills; scratch is forgotten after every step.",
        "input": "An observation as the environment gives it.",
        "output": "The most likely action as the environment takes it, and the distribution of actions.",
    }
    parts = [
        f"/* A policy with memory, written by xlstm_rl {__version__}: {weights} bytes of weights, C99, no allocation.",
        f"{{{told}}}",
        "*/",
        f"#ifndef {prefix.upper()}_DECLARED\n#define {prefix.upper()}_DECLARED",
        "#include <stdint.h>\n",
    ]
    for kind, fields in structs.items():
        lines = [f"    {C_TYPES[field.dtype]} {field.name}[{field.size}];" for field in fields]
        parts += [f"/* {remarks[kind]} */", "typedef struct {", *lines, f"}} {prefix}_{kind};\n"]
    function = (
        f"void {prefix}_step({prefix}_state *state, const {prefix}_input *input, int reset_now, "
        f"{prefix}_output *output)"
    )
    parts += [
        "/* One step; reset_now: the observation is the first of an episode, whatever the state holds. */",
        f"{function};\n#endif\n",
        "/* Files other than the one that holds the policy define this before they include it. */",
        f"#ifndef {prefix.upper()}_DECLARATIONS_ONLY",
        "#include <math.h>\n",
        FUNCTIONS,
        *constants,
        f"{function} {{",
        # whatever has no memory does not read it
        f"    const uint8_t {RESET}[1] = {{reset_now != 0}};\n    (void){RESET};",
        *(f"    {C_TYPES[dtype]} *const {name} = state->{_arena(dtype)} + {at};" for name, dtype, at in places),
    ]
    for statement in traced.statements:
        parts += [f"    {line}" for line in statement.lines]
    parts += ["}\n", _main(prefix, traced, weights), "#endif"]
    return "\n".join(parts)


def _arena(dtype: torch.dtype) -> str:
    return f"scratch_{C_TYPES[dtype].removesuffix('_t')}"


def _scratch(statements: Sequence[Statement]) -> tuple[list[_Field], list[tuple[str, torch.dtype, int]]]:
    """An array per type for intermediate results, and the place of each there: those that live apart share one."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, statement in enumerate(statements):
        for buffer in (*statement.reads, statement.writes):
            if buffer.scratch:
                first.setdefault(buffer, index)
                last[buffer] = index
    sizes: dict[torch.dtype, int] = {}
    placed: dict[Buffer, int] = {}
    for buffer, start in first.items():
        alive = sorted(
            (at, at + other.size)
            for other, at in placed.items()
            if other.dtype == buffer.dtype and last[other] >= start
        )
        at = 0
        for begin, end in alive:
            if begin - at >= buffer.size:
                break
            at = max(at, end)
        placed[buffer] = at
        sizes[buffer.dtype] = max(sizes.get(buffer.dtype, 0), at + buffer.size)
    fields = [_Field(_arena(dtype), "", dtype, (size,)) for dtype, size in sizes.items()]
    return fields, [(buffer.name, buffer.dtype, at) for buffer, at in placed.items()]


def _bytes(buffer: Buffer) -> int:
    assert buffer.values is not None, "asked of constants"
    rows = buffer.size // buffer.values.shape[-1] if buffer.quantized else 0
    return buffer.plain * buffer.size * buffer.values.element_size() + buffer.quantized * buffer.size + 4 * rows


def _constant(buffer: Buffer) -> Iterator[str]:
    """The definitions of a constant in the forms in which it is read."""
    values = buffer.values
    assert values is not None, "asked of constants"
    if buffer.plain:
        yield _array(buffer.name, values)
    if buffer.quantized:
        rows = values.reshape(-1, values.shape[-1])
        scales = rows.abs().amax(1) / _LARGEST_INT8
        # a row of zeros has any scale
        steps = torch.where(scales[:, None] > 0, rows / scales[:, None], 0.0).round()
        yield _array(f"{buffer.name}_int8", steps.to(torch.int8))
        yield _array(f"{buffer.name}_scale", scales)


def _array(name: str, values: Tensor) -> str:
    numbers = [literal(number, values.dtype) for number in values.flatten().tolist()]
    lines = [", ".join(numbers[start : start + _PER_LINE]) for start in range(0, len(numbers), _PER_LINE)]
    body = ",\n    ".join(lines)
    return f"static const {C_TYPES[values.dtype]} {name}[{len(numbers)}] = {{\n    {body}}};\n"


def _main(prefix: str, traced: _Traced, weights: int) -> str:
    """A program that times steps."""
    floats = [field.name for field in traced.inputs if field.dtype.is_floating_point and field.stands_for != RESET]
    sizes = {field.name: field.size for field in traced.inputs}
    draw = "0.01f * (float)((i * 31 + j * 17) % 200 - 100)"
    draws = [f"        for (int j = 0; j < {sizes[name]}; j++) input.{name}[j] = {draw};" for name in floats]
    masks = [
        f"    memset(input.{field.name}, 1, sizeof input.{field.name});"
        for field in traced.inputs
        if field.name == "action_mask"
    ]
    return "\n".join(
        [
            f"#ifdef {prefix.upper()}_MAIN",
            "#include <stdio.h>",
            "#include <string.h>",
            "#include <time.h>",
            "int main(void) {",
            f"    static {prefix}_state state;",
            f"    static {prefix}_input input;",
            f"    static {prefix}_output output;",
            *masks,
            "    const clock_t start = clock();",
            f"    for (int i = 0; i < {_TIMED_STEPS}; i++) {{",
            *draws,
            f"        {prefix}_step(&state, &input, i % 100 == 0, &output);",
            "    }",
            "    const double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;",
            f'    printf("%.2f us a step, {weights} bytes of weights, %u bytes of state and scratch\\n",',
            f"           1e6 * seconds / {_TIMED_STEPS}, (unsigned)sizeof state);",
            "    return 0;",
            "}",
            "#endif\n",
        ]
    )
