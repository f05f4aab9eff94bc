"""What the package's own source says, read without importing it, as importing the agents takes seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib import resources
from typing import Any


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse((resources.files("xlstm_rl") / path).read_text("utf-8"))


def constructor_defaults(path: str, name: str) -> dict[str, Any]:
    """Defaults of the arguments of the constructor of a class, literals all of them.

    Args:
        path: of the module in the package.
        name: of the class.
    """
    (kind,) = (part for part in _tree(path).body if isinstance(part, ast.ClassDef) and part.name == name)
    (init,) = (part for part in kind.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    given = init.args
    positional = [*given.posonlyargs, *given.args]
    # those of the last arguments
    pairs = [*zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True)]
    pairs += [
        (argument, default) for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default
    ]
    return {argument.arg: ast.literal_eval(default) for argument, default in pairs}


def constant(path: str, name: str) -> Any:
    """The literal that a module assigns to a name."""
    for part in _tree(path).body:
        if isinstance(part, ast.Assign) and [ast.unparse(target) for target in part.targets] == [name]:
            return ast.literal_eval(part.value)
    raise LookupError(f"{path} assigns no literal to {name}")


def registered_memories() -> list[str]:
    """Names of the memories that come with the package, sorted."""
    calls = (part.value for part in _tree("memory/__init__.py").body if isinstance(part, ast.Expr))
    return sorted(
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_memory"
    )
