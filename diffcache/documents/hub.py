"""The Hugging Face Hub: files in, files out. Whatever goes wrong there is one error that says how to do without it."""

from __future__ import annotations

import os
from pathlib import Path

from diffcache.errors import HubUnavailable

# The client's errors come from its HTTP library, and that library has changed between versions: so all are caught.


def fetch(id_or_folder: str | Path, filename: str, *, revision: str | None, token: str | bool | None) -> Path:
    """Path of ``filename`` in a local folder or, where there is none of that name, downloaded to the Hub's cache."""
    if os.path.isdir(id_or_folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        return Path(id_or_folder) / filename
    repo = str(id_or_folder)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, filename, revision=revision, token=token))
    except Exception as error:
        next_step = f"There is no local folder {repo!r} either. Download {filename} by other means, then load(path)."
        raise HubUnavailable(repo, filename, _cause(error), next_step) from error


def publish(data: bytes, repo_id: str, filename: str, *, private: bool, token: str | bool | None, message: str) -> str:
    """Upload ``data`` as ``filename``, making the repository if there is none. Returns the commit's address."""
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
    """On one line. An error about the local cache says little; why the Hub was not asked lies at its root."""
    causes = [error]
    while isinstance(error, FileNotFoundError) and causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    told = dict.fromkeys(f"{type(e).__name__}: {' '.join(str(e).split())}".rstrip(".") for e in (error, causes[-1]))
    return "; ".join(told)
