"""The layout of the tree and the directions of imports."""

from __future__ import annotations

import ast
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from setuptools import Distribution  # type: ignore[import-untyped]

from xlstm_rl import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xlstm_rl"
LINKS = ("kernels", "agents", "envs", "configs")
# Each may import those before it.
ORDER = (
    "_version",
    "kernels",
    "memory",
    "vec_envs",
    "agents",
    "rllib",
    "export",
    "inspection",
    "configs",
    "runs",
    "imitation",
    "hub",
    "bench",
    "tuning",
    "cli",
    "__main__",
)
# Meet environments only to register them, to wrap them or to read their facts; agents meet them through gymnasium.
READ_ENVS = {"__init__", "runs", "bench", "cli"}
LOOSE = {"__init__.py", "__main__.py", "_version.py", "cli.py"}
# Folders of many small files of one kind; others are rooms that should be seen at a glance.
WIDE = {"kernels", "envs"}
WIDEST = 14
FILES = sorted(PACKAGE.rglob("*.py"))
OLDEST_PYTHON = (3, 10)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            module = node.module or ""
            yield from ([f"xlstm_rl.{alias.name}" for alias in node.names] if module == "xlstm_rl" else [module])


def imports_of(file: Path) -> Iterator[str]:
    """The modules that a file imports, also where they are imported as names of their folder."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", LINKS)
def test_root_link_is_relative_and_points_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("xlstm_rl") / name
    assert link.is_dir()


def test_every_part_of_the_package_has_a_place_in_the_order() -> None:
    assert {part_of(file) for file in FILES} <= {"__init__", "envs", *ORDER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file: Path) -> None:
    here = part_of(file)
    if here == "__init__":
        return
    modules = list(imported_modules(ast.parse(file.read_text(encoding="utf-8"))))
    parts = {module.split(".")[1] for module in modules if module.startswith("xlstm_rl.")}
    if here == "envs":
        assert parts <= {"envs"}
        return
    allowed = set(ORDER[: ORDER.index(here) + 1]) | ({"envs"} if here in READ_ENVS else set())
    assert parts <= allowed, f"{here} must not import {sorted(parts - allowed)}"


def test_loose_modules_are_the_front_door_only() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == LOOSE


def test_no_file_name_stands_twice_in_the_package() -> None:
    names = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_folders_are_small() -> None:
    sizes = Counter(part_of(file) for file in FILES if file.parent != PACKAGE)
    assert {name: size for name, size in sizes.items() if size > WIDEST and name not in WIDE} == {}


def test_no_import_circle_between_files() -> None:
    """Imports under TYPE_CHECKING and inside functions count too; a folder's `__init__`, which re-exports, does not."""
    modules = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file for file in FILES}
    graph = {name: set(imports_of(file)) & set(modules) for name, file in modules.items() if file.stem != "__init__"}
    # raises CycleError, which names the circle
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) == "envs"], ids=lambda f: f.name)
def test_envs_need_gymnasium_and_numpy_only(file: Path) -> None:
    roots = {module.split(".")[0] for module in imported_modules(ast.parse(file.read_text(encoding="utf-8")))}
    assert roots <= {"gymnasium", "numpy", "xlstm_rl", "__future__", *sys.stdlib_module_names}


@pytest.mark.parametrize("file", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda f: f.name)
def test_no_import_goes_through_a_root_link(file: Path) -> None:
    roots = {module.split(".")[0] for module in imported_modules(ast.parse(file.read_text(encoding="utf-8")))}
    assert not roots & set(LINKS)


def test_importing_the_package_is_light() -> None:
    heavy = ("matplotlib", "triton", "onnx", "tensorboard", "stable_baselines3", "sb3_contrib", "yaml", "rich")
    program = f"import sys, xlstm_rl; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def python_sources() -> list[Path]:
    folders = ("xlstm_rl", "tests", "benchmarks", "examples")
    return [ROOT / "setup.py", *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))]


def base_name(base: ast.expr) -> str:
    base = base.value if isinstance(base, ast.Subscript) else base
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def test_oldest_python_can_read_every_file() -> None:
    # what the standard library lacks there, mypy knows, and neither knows the next test
    for file in python_sources():
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=OLDEST_PYTHON)


def test_no_named_tuple_or_typed_dict_is_generic_which_python_3_10_refuses() -> None:
    refused = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in python_sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and len(node.bases) > 1
        if {"NamedTuple", "TypedDict"} & set(map(base_name, node.bases))
    ]
    assert refused == [], "make these frozen dataclasses"


def test_oldest_python_is_the_one_that_the_package_asks_for() -> None:
    version = ".".join(map(str, OLDEST_PYTHON))
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (f'requires-python = ">={version}"', f'python_version = "{version}"'):
        assert line in settings.splitlines()


def test_citation_names_the_version() -> None:
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("compiler", "clang_cl", "flag"),
    [("msvc", None, None), ("msvc", "clang-cl.exe", "/clang:-std=c++17"), ("unix", None, "-std=c++17")],
)
def test_kernels_are_left_to_compilers_that_know_their_vectors(
    compiler: str, clang_cl: str | None, flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    built: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: settings.update(given))
    monkeypatch.setattr(
        "setuptools.command.build_ext.build_ext.build_extension",
        lambda _, ext: built.update({ext.name: ext.extra_compile_args}),
    )
    monkeypatch.setattr("shutil.which", lambda name: clang_cl)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    command = settings["cmdclass"]["build_ext"](Distribution({"ext_modules": settings["ext_modules"]}))
    command.finalize_options()
    command.compiler = SimpleNamespace(compiler_type=compiler, initialize=lambda: None, cc="cl.exe")
    command.build_extensions()
    assert ("xlstm_rl.kernels._cpp_base" in built) == (flag is not None)
    assert all(flag in flags for flags in built.values())
    assert command.compiler.cc == (clang_cl or "cl.exe")


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_wheel_holds_exactly_the_package_and_its_extension(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "xlstm_rl", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in LINKS:
        (source / name).symlink_to(Path("xlstm_rl") / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    extension = {name for name in held if name.startswith("xlstm_rl/kernels/_cpp_")}
    package = {path.relative_to(source).as_posix() for path in (source / "xlstm_rl").rglob("*") if path.is_file()}
    sources = {name for name in package if name.startswith("xlstm_rl/kernels/cpp/")}
    assert held - extension == package - sources
    assert not extension or "xlstm_rl/kernels/_cpp_base.abi3.so" in extension


def test_no_folder_of_code_is_left_out_by_tools() -> None:
    """A name such as "runs", meant for a folder at the root, would hide those of the package and of its tests too."""
    listed = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {str(file) for file in python_sources()} <= {*listed}
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hidden = {*ast.literal_eval(settings.partition("norecursedirs = ")[2].partition("\n")[0])}
    assert not hidden & {part for file in python_sources() for part in file.relative_to(ROOT).parts}
    if (ROOT / ".git").exists():
        ignored = ["git", "check-ignore", "--no-index", *map(str, python_sources())]
        assert subprocess.run(ignored, cwd=ROOT, capture_output=True, text=True).stdout == ""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository")
def test_nothing_that_make_installs_or_builds_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    made = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(tracked),
        capture_output=True,
        text=True,
    )
    assert made.stdout.split() == []
