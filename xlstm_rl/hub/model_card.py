"""The model card of a run: the page that its repository shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlstm_rl.configs import TrainConfig
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.scores import Score

PAGE = """---
{metadata}
---

# {repository}

An agent with the memory `{memory}` for {task}, after {steps:,} steps of training with the package xlstm_rl.
{video}
| agent | return | success | episodes |
|---|---|---|---|
{rows}

"best without memory" is the most that a policy without memory can reach, "optimum" the most of all; a row without
episodes is known exactly. Returns are followed by their standard errors.

## Use

With xlstm_rl and its extra `hub`:

```
xlstm-rl play hf://{repository}
```

```python
from xlstm_rl import evaluate
from xlstm_rl.runs.open import open_run

with open_run("hf://{repository}") as run:
    print(evaluate(run.model, run.env, 100).mean_return)
```

Loading runs no code from the repository.

## Training

```
{command}
```

The same again: `{again}`, with the file of this repository. Trained with {versions}.
"""


def model_card(
    package: Any,
    repository: str,
    folder: RunFolder,
    config: TrainConfig,
    steps: int,
    scores: Sequence[Score],
    video: Path | None,
) -> str:
    """The card as Markdown, its figures also as metadata that the hub reads.

    Args:
        package: `huggingface_hub`.
        repository: as "user/repo".
        folder: of the run.
        config: of the run.
        steps: that its agent was trained for.
        scores: of its agent, the agent itself first.
        video: of an episode, beside the card.
    """
    agent = scores[0]
    error = 0.0 if agent.standard_error is None else agent.standard_error
    result = package.EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=config.env.id,
        dataset_name=config.env.id,
        metric_type="mean_reward",
        metric_name="mean return +/- standard error",
        metric_value=f"{agent.mean_return:.2f} +/- {error:.2f}",
    )
    metadata = package.ModelCardData(
        model_name=repository.rpartition("/")[2],
        library_name="xlstm_rl",
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "xlstm", "memory", "stable-baselines3", config.env.id.rpartition("/")[2]],
        eval_results=[result],
    )
    versions = json.loads(folder.versions.read_text(encoding="utf-8")) if folder.versions.is_file() else {}
    known = [f"{name} {versions[name]}" for name in ("xlstm_rl", "torch", "python") if name in versions]
    # such as "1000 of oracle"
    source = versions.get("demonstrations", "").partition(" of ")[2]
    again = f"xlstm-rl imitate config.yaml --from {shlex.quote(source)}" if source else "xlstm-rl train config.yaml"
    blocks = config.memory.settings.get("blocks", "")
    return PAGE.format(
        metadata=metadata.to_yaml(),
        repository=repository,
        task=f"`{config.env.id}`" + (f" ({config.description})" if config.description else ""),
        memory=f"{config.memory.name} {blocks}".strip(),
        steps=steps,
        video="" if video is None else f"\n![An episode]({video.name})\n",
        rows="\n".join(map(_row, scores)),
        command=_command(versions.get("command", [])) or again,
        again=again,
        versions=", ".join(known) or "versions that are not known",
    )


def _row(score: Score) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.2g}"
    success = "" if score.success is None else f"{score.success:.2f}"
    return f"| {score.agent} | {score.mean_return:.2f}{error} | {success} | {score.episodes or ''} |"


def _command(words: Sequence[str]) -> str | None:
    """The command that trained, without its folder on the machine where it ran; None for another program."""
    if not words or Path(words[0]).stem != "xlstm-rl" or "--resume" in words:
        return None
    told = ["xlstm-rl", *words[1:]]
    if "--run-dir" in told:
        place = told.index("--run-dir")
        del told[place : place + 2]
    return shlex.join(told)
