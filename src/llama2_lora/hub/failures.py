"""What can go wrong between here and the hub: what is tried again and how often, and a sentence for what is not.

The loop is our own: tenacity's stops and waits count attempts, while a large file is worth another try for as long as bytes
keep coming. That takes a stop and a wait of one's own there, and is longer than `retried`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
import requests
from huggingface_hub import errors

WAIT_SECONDS = 1.0  # before the second try; doubles with each further one
LONGEST_WAIT_SECONDS = 60.0  # however long the hub asks to wait (Retry-After)
IDLE_TRIES = 5  # in a row that brought no byte, after which a file is given up
REDIRECTS = 10
TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
PERMANENT = (
    errors.OfflineModeIsEnabled,
    requests.exceptions.SSLError,  # a ConnectionError to requests
    requests.TooManyRedirects,
    RecursionError,
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Result = TypeVar("Result")


class HubError(OSError):
    """One sentence: what went wrong and what to do."""


class Repository(NamedTuple):
    id: str
    revision: str  # branch, tag or commit; a listing's is always a commit
    type: str = "model"  # or "dataset"

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.type == 'dataset' else ''}{self.id}"


def retried(call: Callable[[], Result], tries: int = IDLE_TRIES, arrived: Callable[[], int] = lambda: 0) -> Result:
    """What `call` returns, called again after connections that dropped and busy servers.

    Raises the error after so many tries in a row that brought no byte (`arrived` counts them), and any other error at once.
    """
    idle = 0
    while True:
        before = arrived()
        try:
            return call()
        except (OSError, RuntimeError) as error:  # hf_xet raises RuntimeErrors
            hidden = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
            cause = hidden or error
            idle = 0 if arrived() > before else idle + 1
            if not _is_transient(cause) or idle == tries:
                raise cause from None
        time.sleep(_wait_seconds(cause, idle))


def limit_redirects() -> None:
    """End a circle of redirects after ten hops, in this thread.

    requests follows 30 of them, and huggingface_hub 0.36 follows relative ones by itself, until Python's stack ends.
    """
    session = huggingface_hub.utils.get_session()  # one per thread
    session.max_redirects = REDIRECTS
    hops = 0

    def count(response: requests.Response, *_: Any, **__: Any) -> None:
        nonlocal hops
        hops = hops + 1 if response.is_redirect else 0
        if hops > REDIRECTS:
            raise requests.TooManyRedirects(response=response)

    session.hooks["response"] = [count]


def explain(error: BaseException, repository: Repository) -> str:
    """A sentence for what huggingface_hub, the network or the disk raised: what it means and what to do."""
    name = f"{repository.type} {repository.id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{name} is gated: accept its terms on {repository.page} and set HF_TOKEN to a token of that account; {_token()}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is missing, private or gated: check the name, and set HF_TOKEN to a token of an account "
            f"that can open {repository.page}; {_token()}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {repository.revision}: see {repository.page}/commits/main"
    if isinstance(error, errors.HFValidationError):
        return f"{repository.id} is no repository name: it must read owner/name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE=1 is set, and not all of {name} is in the cache: unset it, or set HF_HOME to where it is"
    if status == 401:
        return f"the hub refused the token for {name}: set HF_TOKEN to a valid one, or unset it"
    if isinstance(error, (requests.TooManyRedirects, RecursionError)):
        return f"{name}: its address leads in a circle of redirects: check HF_ENDPOINT and the proxy"
    if isinstance(error, requests.exceptions.SSLError):
        return "the hub's certificate is not trusted: check HF_ENDPOINT and the proxy, or set REQUESTS_CA_BUNDLE to your site's"
    if status:
        return f"the hub answered {status} for {name}: run the command again, it continues where it stopped"
    if _disk_is_full(error):
        return "the disk is full: free some space and run the command again, it continues where it stopped"
    if isinstance(error, OSError) and error.errno and not isinstance(error, requests.RequestException):
        return f"{error.filename or 'a file'}: {os.strerror(error.errno)}"
    failed = f"the connection to the hub failed ({type(error).__name__})"
    return f"{failed}: check network, proxy and HF_ENDPOINT, and run the command again; {_token()}"


def _token() -> str:
    return "a token is set" if huggingface_hub.get_token() else "HF_TOKEN is not set, which gated repositories ask for"


def _wait_seconds(error: BaseException, idle: int) -> float:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    if asked.isdecimal():
        return min(float(asked), LONGEST_WAIT_SECONDS)
    return WAIT_SECONDS * 2 ** max(idle - 1, 0)


def _is_transient(error: BaseException) -> bool:
    """Worth another try: connections, timeouts, busy servers, and files that ended early."""
    if isinstance(error, PERMANENT):
        return False
    if isinstance(error, requests.HTTPError):
        status = error.response.status_code if error.response is not None else 0
        return status in (408, 429) or status >= 500
    if isinstance(error, RuntimeError):
        return not _disk_is_full(error)
    return isinstance(error, TRANSIENT) or "Consistency check failed" in str(error)


def _disk_is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in DISK_FULL or "No space left on device" in str(error)
