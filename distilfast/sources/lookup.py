"""What a name in a config is: a pinned asset, a local path, or the name of something on the hub.

A missing local path is never passed on to the hub, where it would end in an error about repository
ids, and a hub that does not answer is found out in seconds and not after minutes of retries.
"""

from __future__ import annotations

import re
from pathlib import Path

from distilfast.errors import ConfigError
from distilfast.sources import assets

ASSETS = {
    "asset:all-MiniLM-L6-v2": assets.minilm,
    "asset:wikipedia-sample": assets.wikipedia_sample,
}
FOLDERS = ("runs", "data", "configs")  # ours, whether they are there yet or not
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_path(key: str, name: str) -> Path | None:
    """The file or folder that ``name`` stands for, fetched if it is an asset; None: a hub name.

    Raises:
        ConfigError: a path that does not exist, or an unknown asset; ``key`` is named.
    """
    if name.startswith("asset:"):
        if name not in ASSETS:
            raise ConfigError(f"{key}: expected one of {', '.join(ASSETS)}, got {name!r}")
        try:
            return ASSETS[name]()
        except assets.AssetError as error:
            raise ConfigError(f"{key}: {error}") from error
    path = Path(name).expanduser()
    if path.exists():
        return path
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(path.suffix[1:])
    first = name.split("/")[0]
    in_folder = "/" in name and (first in FOLDERS or Path(first).is_dir())
    looks_versioned = re.fullmatch(r"\.\d+.*", path.suffix or "")  # "gpt-3.5" is no file name
    if in_folder or (is_path and not looks_versioned) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: expected an existing file or folder, got {name!r}")
    return None


def model_source(key: str, name: str, revision: str | None = None) -> str:
    """What transformers loads a model from: a folder, or a hub name that can be had.

    Raises:
        ConfigError: a folder without a model, or a name that the hub does not have.
    """
    path = local_path(key, name)
    if path is None:
        require_hub(key, name, revision=revision)
        return name
    if not (path / "config.json").is_file():
        raise ConfigError(f"{key}: expected a folder with config.json, got {str(path)!r}")
    return str(path)


def require_hub(key: str, name: str, repo_type: str = "model", revision: str | None = None) -> None:
    """That a hub name can be loaded: the hub answers, or the cache holds it.

    Where the hub does not answer and the cache holds the name, the libraries are switched to the
    cache. Takes at most some seconds.

    Raises:
        ConfigError: neither.
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
    # From here on nothing asks the hub again: each question would be retried for minutes.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
