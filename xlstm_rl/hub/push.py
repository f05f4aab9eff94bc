"""A run uploaded to the Hugging Face Hub with its model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.hub_runs import REPOSITORY, SHARED_FILES, hub, is_in_hub
from xlstm_rl.hub.model_card import model_card
from xlstm_rl.inspection import record_episode
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.live import say
from xlstm_rl.runs.open import FinishedRun, open_run, write_video
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.runs.train import evaluate_run
from xlstm_rl.vec_envs.env_contract import seed_envs

# Of the filmed episode.
MOST_STEPS = 300
CARD, VIDEO = "README.md", "episode.gif"


def push_run(
    run_dir: Path | str,
    repository: str,
    *,
    private: bool = False,
    episodes: int | None = None,
    console: Console | None = None,
) -> str:
    """Upload the configuration, models and curve of a run, with a card that tells what the last model reaches.

    Neither checkpoints, events nor versions go with them. A repository that exists gets a new commit, which replaces
    what an earlier push brought.

    Args:
        run_dir: as `train` made it.
        repository: "user/repo"; made if it is missing.
        private: whether a new one is.
        episodes: played for the card by each agent; None takes the configured number.
        console: told how far it is; None tells nobody.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: as for `evaluate_run`; the package or a token is missing, or the hub cannot be reached or refuses.
    """
    console = console or Console(quiet=True)
    repository = repository.removeprefix("hf://")
    if is_in_hub(run_dir):
        raise ConfigError(f"{run_dir} is in the hub already; give the folder of a run")
    failure = f"{run_dir} cannot be pushed to {repository}"
    with hub(failure) as package:
        # before anything is played
        if REPOSITORY.fullmatch(repository) is None:
            raise ConfigError(f"{failure}: write it as user/repo, in letters, digits, '-', '_' and '.'")
        if package.get_token() is None:
            raise ConfigError(f"{failure}: there is no token; call `hf auth login`, or set HF_TOKEN")
    folder = RunFolder(Path(run_dir))
    config = folder.load_config()
    with TemporaryDirectory() as scratch:
        staged = Path(scratch)
        # first, so that what is played is what goes: a run that trains writes new ones
        _stage(folder, staged)
        scores = evaluate_run(staged, n_episodes=episodes, console=console)
        with open_run(staged, device="cpu", render=True) as run:
            steps, video = run.model.num_timesteps, _film(run, staged / VIDEO)
        with hub(failure) as package:
            card = model_card(package, repository, folder, config, steps, scores, video)
            (staged / CARD).write_text(card, encoding="utf-8")
            package.create_repo(repository, private=private or None, exist_ok=True)
            commit = package.upload_folder(
                repo_id=repository,
                folder_path=staged,
                commit_message=f"Agent for {config.env.id}",
                delete_patterns=[*SHARED_FILES, VIDEO],
            )
    say(console, f"pushed: {commit.commit_url}; open it anywhere with: xlstm-rl play hf://{repository}")
    return str(commit.commit_url)


def _stage(folder: RunFolder, staged: Path) -> None:
    """Copy what is shared of a run; where it has not ended, the last checkpoint is its model."""
    shutil.copy(folder.latest_model(), staged / folder.model.name)
    for name in SHARED_FILES:
        if (folder.path / name).is_file() and not (staged / name).is_file():
            shutil.copy(folder.path / name, staged)


def _film(run: FinishedRun, path: Path) -> Path | None:
    """An episode as a GIF, or None where the task draws nothing."""
    seed_envs(run.env, environment_seed(run.config.seed, Purpose.INSPECTION))
    episode = record_episode(run.model, run.env, max_steps=MOST_STEPS)
    if not episode.frames:
        return None
    write_video(run, episode, path)
    return path
