"""Resolve a name in a configuration: a pinned asset, a local path, or a name on the hub.

A missing local path is never passed on to the hub, whose error would be about repository ids. A hub
that does not answer is noticed within seconds, not after minutes of retries.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from distilfast.errors import ConfigError
from distilfast.sources import assets

ASSETS = {
    "asset:SmolLM2-135M-Instruct": assets.smollm2,
    "asset:all-MiniLM-L6-v2": assets.minilm,
    "asset:wikipedia-sample": assets.wikipedia_sample,
}
FOLDERS = ("runs", "data", "configs")  # always local, even if they do not exist yet
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_path(key: str, name: str) -> Path | None:
    """The file or folder that ``name`` stands for. An asset is fetched. None: it is a hub name.

    Raises:
        ConfigError: the path does not exist or the asset is unknown. The message names ``key``.
    """
    if name.startswith("asset:"):
        if name not in ASSETS:
            raise ConfigError(f"{key}: expected one of {', '.join(ASSETS)}, got {name!r}")
        try:
            return ASSETS[name]()
        except assets.AssetError as error:
            raise ConfigError(f"{key}: {error}") from error
    if (found := existing(name)) is not None:
        return found
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(path.suffix[1:])
    first = name.split("/")[0]
    in_folder = "/" in name and (first in FOLDERS or Path(first).is_dir())
    looks_versioned = re.fullmatch(r"\.\d+.*", path.suffix or "")  # "gpt-3.5" is not a file
    if in_folder or (is_path and not looks_versioned) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: expected an existing file or folder, got {name!r}")
    return None


def existing(name: str) -> Path | None:
    """The file or folder of that name, if there is one. ~ and ~user stand for home folders."""
    path = os.path.expanduser(name)
    return Path(path) if os.path.exists(path) else None


def model_source(key: str, name: str, revision: str | None = None) -> str:
    """The folder or available hub name that transformers loads a model from.

    Raises:
        ConfigError: the folder has no model, or an adapter beside it, or `require_hub` fails.
    """
    path = local_path(key, name)
    if path is None:
        require_hub(key, name, revision=revision)
        return name
    if not (path / "config.json").is_file():
        hint, model = "", path / "model"
        if (model / "config.json").is_file():
            hint = f"; did you mean {str(model)!r}?"
        elif (path / "config.yaml").is_file():
            hint = ", a run that is not finished"
        raise ConfigError(f"{key}: expected a folder with config.json, got {str(path)!r}{hint}")
    if (path / "adapter_config.json").is_file():  # with peft it would be applied, else left out
        raise ConfigError(
            f"{key}: expected a model without an adapter, got adapter_config.json in "
            f"{str(path)!r}; merge the adapter, or move it away"
        )
    return str(path)


def require_hub(key: str, name: str, repo_type: str = "model", revision: str | None = None) -> None:
    """Check that the hub answers or the cache holds ``name``. This takes a few seconds at most.

    If only the cache holds it, the libraries are switched to offline mode.

    Raises:
        ConfigError: the hub does not answer and the cache does not hold the name.
    """
    import huggingface_hub

    if assets.hub_answers():
        return
    try:
        huggingface_hub.snapshot_download(
            name, repo_type=repo_type, revision=revision, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: expected a folder or a name that the hub knows, got {name!r}; the hub does "
            "not answer and the cache does not hold it"
        ) from error
    # From here on nothing asks the hub again: each request would be retried for minutes.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
