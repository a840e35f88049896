"""What the hub's and the library's exceptions mean, in one paragraph that says what to do.

In: an exception of huggingface_hub, of its HTTP client, or of `datasets`. Out: a `DataError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from data_prep.names import one_line
from data_prep.shards import DataError

SHOWN_REASON = 300  # characters of a library's message
RESUMES = "Finished shards are kept, and the same command continues after them."
# Names of the HTTP client's classes: the client is httpx or httpx2, by the version of huggingface_hub.
UNREACHABLE = {"TransportError", "ConnectError", "TimeoutException", "ProxyError", "ConnectionError", "SSLError"}


@contextmanager
def explained(given: str, name: str) -> Iterator[None]:
    """Turn exceptions into a `DataError` about `given`, a file or specification of the data set `name`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries raise
        raise DataError(f"{given}: {_meaning(error, name)}") from error


def _meaning(error: BaseException, name: str) -> str:
    for one in _chain(error):
        if (found := _meaning_of(one, name)) is not None:
            return found
    return f"it cannot be opened ({type(error).__name__}: {one_line(error)[:SHOWN_REASON]})."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, its cause, the cause of that."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _meaning_of(error: BaseException, name: str) -> str | None:
    """The paragraph for an exception that is understood, else None."""
    classes = {one.__name__ for one in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "OfflineModeIsEnabled" in classes:
        return f"HF_HUB_OFFLINE is set, so the hub is not asked. Unset it, or {_copy_by_hand(name)}"
    if "GatedRepoError" in classes:
        return (
            f"the data set is gated. Accept its conditions at {_endpoint()}/datasets/{name}, and log in here with a token of "
            "that account: hf auth login (or HF_TOKEN)."
        )
    if "RepositoryNotFoundError" in classes:
        return (
            f"{_endpoint()} has no public data set {name}. Correct the name; for a private or gated one log in with a token "
            "that may read it: hf auth login (or HF_TOKEN)."
        )
    if "RevisionNotFoundError" in classes:
        return (
            f"the data set {name} has no such revision. Give a branch, tag or commit of {_endpoint()}/datasets/{name}."
        )
    if status == 429:
        return (
            f"the hub limits the rate of requests (HTTP 429). Wait some minutes; with a token the limit is higher: hf auth "
            f"login (or HF_TOKEN). {RESUMES}"
        )
    if status in (401, 403):
        return (
            f"the hub denies access (HTTP {status}). Log in with a token that may read it: hf auth login (or HF_TOKEN)."
        )
    if status is not None and status >= 500:
        return f"the hub answered HTTP {status}. Try later. {RESUMES}"
    if classes & UNREACHABLE:
        return (
            f"the hub {_endpoint()} cannot be reached ({one_line(error)[:SHOWN_REASON] or type(error).__name__}). Check the "
            f"network and its proxy (HTTPS_PROXY), or HF_ENDPOINT. {RESUMES} For a machine without network, "
            f"{_copy_by_hand(name)}"
        )
    return None


def _copy_by_hand(name: str) -> str:
    return (
        f"copy the data set where there is network (hf download {name} --repo-type dataset --local-dir DIR; for a part of it, with "
        "--include README.md --include 'PATTERN') and give hf:DIR[:CONFIG[:SPLIT]] as input."
    )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
