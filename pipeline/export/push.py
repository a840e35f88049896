"""Upload an export to a model hub, where a user asks for it (`pipeline export --push OWNER/NAME`). Never needed.

In: a repository's name, later the export. Out: a private repository with the export's files. The login is asked for
before anything is made, so that a missing one comes to light at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from pipeline.errors import UserError

try:
    from httpx2 import HTTPError
except ModuleNotFoundError:  # huggingface_hub 1.x speaks through httpx
    from httpx import HTTPError  # type: ignore[no-redef]

LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


def check_login(repository: str) -> None:
    """A `UserError` unless the name can be one and the hub knows who asks."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: no name of a repository (OWNER/NAME): {error}") from None
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(
            f"--push {repository}: nobody is logged in; {LOG_IN}. Without --push nothing is needed."
        ) from None
    except (OSError, HTTPError) as error:
        _refuse(repository, error)


def files_to_push(student: Path) -> list[str]:
    """What an upload takes along: every plain file of the export, nothing hidden."""
    paths = (path for path in student.rglob("*") if path.is_file())
    names = (path.relative_to(student) for path in paths)
    return sorted(
        str(name) for name in names if not any(part.startswith(".") or part.endswith(".tmp") for part in name.parts)
    )


def push(student: Path, repository: str) -> str:
    """Upload and return the address. A repository that is made for it is private."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=student,
            allow_patterns=files_to_push(student),
            commit_message="Upload of an export",
        )
    except (OSError, HTTPError) as error:
        _refuse(repository, error)
    return str(done)


def _refuse(repository: str, error: Exception) -> NoReturn:
    what = "the hub is not to be had"
    if isinstance(error, HfHubHTTPError):
        what = f"the hub refused ({error.response.status_code})"
    raise UserError(
        f"--push {repository}: {what}: {' '.join(str(error).split())[:200]} Mend it ({LOG_IN}), or upload the directory later: "
        f"hf upload {repository} STUDENT"
    ) from None
