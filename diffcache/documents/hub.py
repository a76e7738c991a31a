"""Download files from the Hugging Face Hub and upload files to it. All failures raise HubUnavailable."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from diffcache.errors import HubUnavailable

# The errors of the client come from its HTTP library, which has changed between versions. Therefore all are caught.


def fetch(id_or_folder: str | Path, filename: str, *, revision: str | None, token: str | bool | None) -> Path:
    """Return the path of a file in a local folder or, if there is none of that name, in the cache of a download.

    Raises:
        HubUnavailable: If the file cannot be downloaded.
    """
    if os.path.isdir(id_or_folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        return Path(id_or_folder) / filename
    repo = str(id_or_folder)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, filename, revision=revision, token=token))
    except Exception as error:
        next_step = f"There is no local folder {repo!r} either. Download {filename} by other means, then load(path)."
        raise HubUnavailable(repo, filename, _cause(error), next_step) from error


def folder(id_or_folder: str | Path, pattern: str) -> Path | None:
    """Return a local folder or, if there is none of that name, one with the files of a repository that fit ``pattern``.

    Returns:
        The folder. None if the repository could not be listed; ``fetch`` then states the reason.
    """
    if os.path.isdir(id_or_folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        return Path(id_or_folder)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(id_or_folder), allow_patterns=[pattern]))
    except Exception as error:  # the hub client and the network raise many classes; ``fetch`` reports the reason
        logging.getLogger("diffcache").debug("%s could not be listed on the Hub: %s", id_or_folder, error)
        return None


def publish(data: bytes, repo_id: str, filename: str, *, private: bool, token: str | bool | None, message: str) -> str:
    """Upload ``data`` as a file, create the repository if it does not exist, and return the address of the commit.

    Raises:
        HubUnavailable: If the file cannot be uploaded.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_file(
            path_or_fileobj=data, path_in_repo=filename, repo_id=repo_id, commit_message=message
        ).commit_url
    except Exception as error:
        next_step = "Write it with save(path) and upload that file later."
        raise HubUnavailable(repo_id, filename, _cause(error), next_step) from error


def _cause(error: BaseException) -> str:
    """Return an error's class and message on one line.

    For a FileNotFoundError, which is about the local cache, the error that caused it is appended.
    """
    causes = [error]
    while isinstance(error, FileNotFoundError) and causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    told = dict.fromkeys(f"{type(e).__name__}: {' '.join(str(e).split())}".rstrip(".") for e in (error, causes[-1]))
    return "; ".join(told)
