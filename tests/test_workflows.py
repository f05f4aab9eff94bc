"""What runs elsewhere, at each push and each release, held against its schemas and against the project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
SCHEMAS = [
    *((file, "vendor.github-workflows") for file in WORKFLOWS),
    *((file, "custom.github-workflows-require-timeout") for file in WORKFLOWS),
    *((file, "vendor.github-issue-forms") for file in FORMS),
    (ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml", "vendor.github-issue-config"),
    (ROOT / ".github" / "dependabot.yml", "vendor.dependabot"),
    (ROOT / "CITATION.cff", "vendor.citation-file-format"),
]


def jobs_of(workflow: str) -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text(encoding="utf-8"))["jobs"]
    return jobs


def steps() -> list[dict[str, Any]]:
    return [step for file in WORKFLOWS for job in jobs_of(file.name).values() for step in job["steps"]]


@pytest.mark.parametrize(("file", "schema"), SCHEMAS, ids=lambda value: getattr(value, "name", value))
def test_file_obeys_its_schema(file: Path, schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_python_of_the_package_is_tested() -> None:
    listed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    matrix = jobs_of("test.yml")["test"]["strategy"]["matrix"]
    assert matrix["python"] == listed
    systems = {*matrix["os"], *(entry["os"] for entry in matrix["include"])}
    assert {name.partition("-")[0] for name in systems} == {"ubuntu", "macos", "windows"}


def test_targets_of_make_that_workflows_name_are_there() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name for step in steps() for name in re.findall(r"make ([a-z][a-z-]*)", step.get("run", ""))}
    named |= {*jobs_of("test.yml")["triton"]["strategy"]["matrix"]["job"]}
    assert {"test", "docs", "test-triton-interpreter", "test-triton-compiler", "test-rllib"} == named <= set(targets)


def test_tool_that_makes_the_sdist_is_pinned_as_in_the_constraints() -> None:
    pinned = re.findall(r"^build==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned == re.findall(r"\bbuild==\S+", " ".join(step.get("run", "") for step in steps()))


def test_hooks_before_commits_run_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    run = {" ".join(hook["entry"].split()[:2]).removeprefix(".venv/bin/") for hook in hooks}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    assert run == {"ruff check", "ruff format", "mypy"}
    assert all(f"$(BIN)/{command}" in lint for command in run)


def test_gpu_kernels_are_tested_with_the_triton_of_the_constraints() -> None:
    pinned = re.findall(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {*pinned} < {*jobs_of("test.yml")["triton"]["strategy"]["matrix"]["triton"]}
    assert f"TRITON ?= {pinned[0]}" in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
