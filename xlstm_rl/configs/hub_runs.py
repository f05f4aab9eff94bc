"""Runs in the Hugging Face Hub: fetched where one is named as hf://user/repo, and at no other time."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlstm_rl.configs.validation import ConfigError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# `Path` leaves one of the two slashes.
NAME = re.compile(rf"hf:/{{1,2}}({REPOSITORY.pattern})(?:@([\w./-]+))?", re.ASCII)
# Of a run folder: what the hub gets and gives.
SHARED_FILES = ("config.yaml", "model.zip", "best.zip", "returns.csv", "curve.png")


def is_in_hub(run: Path | str) -> bool:
    """Whether a run is named by its place in the hub."""
    return _spelled(run).startswith("hf:/")


def fetch_run(run: Path | str) -> Path:
    """The folder of a run on this machine; one that is named hf://user/repo[@revision] is downloaded.

    It lies in the cache of `huggingface_hub` then, where later calls find what has not changed, without a network too.

    Raises:
        ConfigError: the package is missing, the hub cannot be reached, or there is no such run.
    """
    if not is_in_hub(run):
        return Path(run)
    name = _spelled(run)
    found = NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name} names no repository; write hf://user/repo, or hf://user/repo@revision")
    repository, revision = found.groups()
    with hub(f"{name} cannot be fetched") as package:
        folder = Path(package.snapshot_download(repository, revision=revision, allow_patterns=[*SHARED_FILES]))
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{name} is no run of xlstm_rl: it holds no config.yaml; name one that `xlstm-rl push` made")
    return folder


def _spelled(run: Path | str) -> str:
    return run.as_posix() if isinstance(run, Path) else run


@contextmanager
def hub(failure: str) -> Iterator[Any]:
    """The package `huggingface_hub`, whose errors become one sentence.

    Args:
        failure: how the sentence starts.

    Raises:
        ConfigError: the package is missing, or the hub does not do what it is asked for.
    """
    try:
        package: Any = importlib.import_module("huggingface_hub")
        errors: Any = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ConfigError(
            f"{failure}: the package 'huggingface_hub' is missing ({error}): pip install 'xlstm_rl[hub]'"
        ) from error
    try:
        yield package
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{failure}: the repository has no such revision") from error
    except errors.GatedRepoError as error:
        raise ConfigError(f"{failure}: access has to be asked for on the page of the repository") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{failure}: there is no such repository, or it is private and no token with access is set; check the "
            "name, or call `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "; call `hf auth login` with a token that may do this" if status in (401, 403) else ""
        raise ConfigError(f"{failure}: the hub answers {status}: {_first_line(error)}{remedy}") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{failure}: {_first_line(error)}") from error
    # of the network, of its absence on purpose, and of the disk
    except (errors.HTTPError, OSError) as error:
        cause = error.__cause__ or error
        network = isinstance(error, errors.HTTPError | errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
        what = "the hub cannot be reached and nothing of it was fetched before: " if network else ""
        raise ConfigError(f"{failure}: {what}{_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
