"""Uploads an export to a model hub (`pipeline export --push OWNER/NAME`). Nothing else needs a hub.

In: the name of a repository, and the export. Out: a private repository with the files of the export. The login is checked
before the export starts.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import NoReturn

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from pipeline.errors import UserError
from pipeline.export.hf import PRODUCTS

try:
    from httpx2 import HTTPError
except ModuleNotFoundError:  # huggingface_hub 1.x speaks through httpx
    from httpx import HTTPError  # type: ignore[no-redef]

LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


def check_login(repository: str) -> None:
    """Raise a `UserError` unless the name of the repository is possible and the hub accepts the login."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: not a possible name of a repository (OWNER/NAME): {error}") from None
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push {repository}: nobody is logged in; {LOG_IN}. Without --push no login is needed."
        ) from None
    except (OSError, HTTPError) as error:
        _fail(repository, error)


def files_to_push(student: Path) -> list[str]:
    """Names of the files that are uploaded: every plain file of the export, without hidden and temporary ones."""
    paths = (path for path in student.rglob("*") if path.is_file())
    names = (path.relative_to(student) for path in paths)
    return sorted(
        str(name) for name in names if not any(part.startswith(".") or part.endswith(".tmp") for part in name.parts)
    )


def left_over(there: Iterable[str], pushed: Collection[str]) -> list[str]:
    """Files in a repository that an earlier export left and this one does not have: they are of another model.

    A modules.json or onnx/ of the export before would be loaded with the new weights, or in their place.
    """
    return sorted(
        name
        for name in set(there).difference(pushed)
        if any(fnmatch.fnmatchcase(PurePosixPath(name).parts[0], product) for product in PRODUCTS)
    )


def push(student: Path, repository: str) -> str:
    """Upload the export in the place of an earlier one and return its address. A new repository is private."""
    api, files = HfApi(), files_to_push(student)
    try:
        repository = api.create_repo(
            repository, private=True, exist_ok=True
        ).repo_id  # with the owner, if none was named
        removed = left_over(api.list_repo_files(repository), files)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=student,
            allow_patterns=files,
            delete_patterns=[glob.escape(name) for name in removed],
            commit_message="Upload of an export",
        )
    except (OSError, HTTPError) as error:
        _fail(repository, error)
    if removed:
        print(f"removed from {repository}, files of an earlier export: {', '.join(removed)}")
    return str(done)


def _fail(repository: str, error: Exception) -> NoReturn:
    what = "the hub cannot be reached"
    if isinstance(error, HfHubHTTPError):
        what = f"the hub rejected the request ({error.response.status_code})"
    raise UserError(
        f"--push {repository}: {what}: {' '.join(str(error).split())[:200]} Fix this ({LOG_IN}), or upload the directory later: "
        f"hf upload {repository} STUDENT"
    ) from None
