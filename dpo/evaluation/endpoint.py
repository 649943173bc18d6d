"""Requests to OpenAI-compatible servers, with retries. No message contains the API key."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, TypeVar

import httpx

from dpo.common.errors import InputError, TransientError
from dpo.common.progress import progress

MAX_ATTEMPTS = 8
FIRST_WAIT = 1.0  # maximum seconds before the second attempt; it doubles with each attempt
MAX_RETRY_AFTER = 120.0  # seconds; if a server asks for a longer wait, the request fails
RETRIED_STATUSES = {408, 409, 429}  # besides those from 500 on

Item = TypeVar("Item")


@dataclass(frozen=True)
class Endpoint:
    """One address of a server.

    Attributes:
        base_url: the address up to and with `/v1`.
        path: the rest of the address, such as `chat/completions`.
        where: the section of params.yaml that errors name.
        key_variable: the environment variable that holds the API key. Without it, requests have no key.
        fixes: the fix that an error names, by status.
        after: the end of the message of a TransientError: what to do.
        read_seconds: time limit of one attempt.
    """

    base_url: str
    path: str
    where: str
    key_variable: str
    fixes: Mapping[int, str]
    after: str
    read_seconds: float = 300
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Read the key, unless it is given, and check it and the address."""
        key = self.api_key or os.environ.get(self.key_variable, "").strip()
        object.__setattr__(self, "api_key", key)
        if not _is_http_url(self.url):
            fault = f"'{self.base_url}' is not an http address; write it as http://127.0.0.1:8000/v1"
            raise InputError(f"{self.where}.base_url: {fault}")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError(
                f"{self.key_variable} contains characters that are not allowed in a key; set it again"
            )

    @property
    def url(self) -> str:
        """The address of requests."""
        return f"{self.base_url.rstrip('/')}/{self.path}"

    def for_each(
        self,
        items: Sequence[Item],
        work: Callable[[httpx.Client, Item], None],
        parallel: int,
        title: str,
        unit: str,
    ) -> None:
        """Call `work(client, item)` for all items, `parallel` at a time. The first error stops the others."""
        failed = Event()
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        options: dict[str, Any] = {
            "timeout": httpx.Timeout(self.read_seconds, connect=10, pool=None),
            "limits": httpx.Limits(max_connections=parallel),
            "trust_env": httpx.URL(self.url).host not in ("127.0.0.1", "localhost"),  # no proxy for this machine
        }
        with (
            httpx.Client(headers=headers, **options) as client,
            ThreadPoolExecutor(parallel) as pool,
            progress(total=len(items), desc=title, unit=unit, mininterval=2) as bar,
        ):

            def do(item: Item) -> None:
                if failed.is_set():
                    return
                try:
                    work(client, item)
                except BaseException:
                    failed.set()
                    raise

            try:
                for _ in pool.map(do, items):
                    bar.update()
            finally:
                failed.set()

    def post(self, client: httpx.Client, body: Mapping[str, Any]) -> str:
        """Return the body of the reply to a request. Transient faults are retried with exponential backoff.

        Raises:
            InputError: the server rejects the request.
            TransientError: the server does not reply in `MAX_ATTEMPTS`.
        """
        for attempt in range(MAX_ATTEMPTS):
            retry_after = 0.0
            try:
                response = client.post(self.url, json=body)
            except httpx.RequestError as error:
                fault = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response.text
                status, retry_after = response.status_code, _retry_after(response.headers)
                fault = f"status {status}: {self.excerpt(response.text)}"
                if status not in RETRIED_STATUSES and not response.is_server_error:
                    raise InputError(
                        f"{self.where}: {self.url} rejected the request, {fault}; {self._fix(status)}"
                    )
            if attempt + 1 == MAX_ATTEMPTS or retry_after > MAX_RETRY_AFTER:
                break
            time.sleep(max(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1), retry_after))
        waiting = f" (it asks to wait {retry_after:.0f} seconds)" if retry_after else ""
        raise TransientError(
            f"{self.where}: {self.url} did not reply in {attempt + 1} attempts, {fault}{waiting}; {self.after}"
        )

    def excerpt(self, text: str) -> str:
        """Return the start of a text on one line, without the key."""
        return " ".join(self.without_key(text).split())[:300]

    def without_key(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self.api_key, "[key]") if self.api_key else text

    def _fix(self, status: int) -> str:
        fixes = {
            401: f"set {self.key_variable} to a key of this server",
            403: f"set {self.key_variable} to a key with access to the model",
            404: "correct the model or base_url, which usually ends in /v1",
            **self.fixes,
        }
        return fixes.get(status, f"correct the settings in {self.where}")


def _is_http_url(url: str) -> bool:
    with suppress(httpx.InvalidURL):
        return httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    return False


def _retry_after(headers: httpx.Headers) -> float:
    """Return the seconds in the header Retry-After, or 0 if there are none."""
    value = headers.get("Retry-After", "")
    with suppress(ValueError):
        return float(value)
    with suppress(ValueError, TypeError):
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    return 0.0
