"""The Python examples of the README and of the pages in docs/ run as they stand, most of them with fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sb3_contrib
import yaml
from stable_baselines3.common.env_util import make_vec_env

from xlstm_rl import evaluate
from xlstm_rl.configs import EnvConfig, TrainConfig, load
from xlstm_rl.configs.validation import plain
from xlstm_rl.export import compiler
from xlstm_rl.memory.core import _REGISTRY

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    return blocks


def run_blocks(page: str, long: str = r"learn\(\d+_000", short: str = "learn(256") -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, shortened, and return what they define."""
    namespace: dict[str, Any] = {"__name__": page}
    for block in python_blocks(page):
        exec(re.sub(long, short, block), namespace)
    return namespace


def test_readme_examples_run_one_after_the_other() -> None:
    assert run_blocks("README.md")["y"].shape == (8, 64)


@pytest.mark.slow
def test_readme_agent_learns_within_its_budget() -> None:
    namespace: dict[str, Any] = {"__name__": "README.md"}
    exec(python_blocks("README.md")[0], namespace)
    model = namespace["model"]
    assert model.num_timesteps >= 100_000
    env = make_vec_env("xlstm_rl/TMaze-v0", n_envs=16, env_kwargs={"corridor_length": 10})
    assert evaluate(model, env, 200, seed=2).returns.mean() >= 0.95
    # Without memory the arm is a guess: beyond 0.7 once in 10 million.
    assert evaluate(model, env, 200, seed=2, empty_state_every_step=True).returns.mean() < 0.7


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "advantage_floor" in api and "check_memory_laws" in api


@pytest.mark.parametrize(
    "page", ["action_masks", "memory_inputs", "migration", "vector_environments", "index", "plug_in", "evaluation"]
)
def test_pages_of_the_docs_run(page: str) -> None:
    assert run_blocks(f"docs/{page}.md")["model"].num_timesteps >= 256


RECIPES = python_blocks("docs/sb3_recipes.md")


# What the recipe on schedules says happens to a function.
@pytest.mark.filterwarnings("ignore:learning_rate is a function")
@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_recipe_runs_by_itself(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs/sb3_recipes.md"}
    exec(re.sub(r"learn\(\d+_000", "learn(256", recipe), namespace)
    assert namespace["model"].num_timesteps >= 256


# Minari would like to know more about a dataset.
@pytest.mark.filterwarnings("ignore:`")
def test_page_on_demonstrations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    page = run_blocks("docs/demonstrations.md")
    assert len(page["losses"]) == 2 and page["losses"][-1] < 0.5


def test_page_on_checkpoints_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = make_vec_env("xlstm_rl/TMaze-v0", n_envs=1)
    sb3_contrib.RecurrentPPO("MlpLstmPolicy", theirs, n_steps=8, batch_size=8).save("ppo_recurrent.zip")
    with pytest.warns(UserWarning, match="pickle"):
        run_blocks("docs/checkpoints.md", r"(\d+)0_000", r"\g<1>0")
    assert Path("last.zip").is_file() and Path("safe.zip").is_file()


def test_page_on_configuration_names_every_key_with_its_default(tmp_path: Path) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    told: dict[str, Any] = {}
    for keys, default in re.findall(r"^\| (`.*?`) \| (.*?) \|", page.partition("## Keys")[2], flags=re.MULTILINE):
        names, values = re.findall(r"`(.*?)`", keys), [yaml.safe_load(f"[{default}]".replace("`", ""))]
        values = values[0] if len(names) > 1 else [(values[0] or [None])[0]]
        told |= dict(zip(names, values if len(values) > 1 else values * len(names), strict=True))
    config = plain(TrainConfig(env=EnvConfig("")))
    real = {
        f"{section}.{key}": value
        for section, values in config.items()
        if isinstance(values, dict)
        for key, value in values.items()
    } | {key: value for key, value in config.items() if not isinstance(value, dict)}
    assert told.keys() == real.keys()
    for key, value in real.items():
        if key != "env.id":
            assert str(told[key]) == str(value) or float(told[key]) == value, key
    example = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0]
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    mine = load(str(tmp_path / "mine.yaml"), ["ppo.learning_rate=5e-4", "memory.blocks=ms"])
    assert (mine.env.n_envs, mine.ppo.gae_lambda, mine.memory.settings["hidden_size"]) == (8, 0.9, 32)


def test_memories_of_the_docs_have_equal_size() -> None:
    cores = run_blocks("docs/choosing_a_memory.md")
    sizes = [sum(part.numel() for part in cores[name].parameters()) for name in ("lstm", "ssm")]
    assert max(sizes) < 1.1 * min(sizes)


def test_tasks_of_the_docs_run() -> None:
    assert run_blocks("docs/tasks.md")["env"].length == 14


def test_page_on_looking_inside_runs() -> None:
    assert run_blocks("docs/inspect.md")["episode"].ended in ("terminated", "truncated", "cut")


def test_page_on_export_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks("docs/export.md")["metadata"]["action"]["distribution"] == "categorical"
    if compiler() is not None:
        (program,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
        Path("main.c").write_text(program)
        subprocess.run([str(compiler()), "-std=c99", "-Wall", "-Werror", "main.c", "-lm", "-o", "main"], check=True)
        said = subprocess.run(["./main"], capture_output=True, text=True, check=True).stdout
        assert set(said.split()) <= {"0", "1"} and len(said.split()) == 100


def test_page_on_trained_agents_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert run_blocks("docs/hub.md")["returns"].mean() == 1.0


def test_memory_of_the_docs_is_registered() -> None:
    core = run_blocks("docs/own_memory.md")["OneGate"]
    assert _REGISTRY.pop("one-gate") is core
