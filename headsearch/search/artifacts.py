"""Objects in an S3-compatible store, through Optuna's artifact stores.

Endpoint and credentials are boto3's own environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from optuna.artifacts import Boto3ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from headsearch.errors import InputError, StorageError

CONNECT_SECONDS = 10
READ_SECONDS = 60
ATTEMPTS = 4


class Store:
    """A bucket, and a prefix of the names in it."""

    def __init__(self, url: str) -> None:
        """`url` is ``s3://bucket`` or ``s3://bucket/prefix``. Raises InputError where boto3 is missing."""
        if importlib.util.find_spec("boto3") is None:
            raise InputError(
                "worker.checkpoint_store: S3 needs boto3, which is not here: pip install 'headsearch[s3]'"
            )
        import boto3
        from botocore.config import Config

        parts = urlsplit(url)
        self.url, self.prefix = url, parts.path.strip("/")
        options = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"max_attempts": ATTEMPTS, "mode": "standard"},
        )
        with self._translated("opened"):
            client = boto3.session.Session().client("s3", config=options)
            # The content is in memory already, so it need not be copied once more.
            self._store = Boto3ArtifactStore(parts.netloc, client, avoid_buf_copy=True)

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Put an object, whole or not at all. Raises StorageError."""
        content = io.BytesIO(b"".join(parts))
        with self._translated("written"):
            self._store.write(self._key(name), content)

    def read(self, name: str) -> bytes | None:
        """Get an object, or None if there is none. Raises StorageError."""
        with self._translated("read"):
            try:
                with contextlib.closing(self._store.open_reader(self._key(name))) as body:
                    return body.read()
            except ArtifactNotFound:
                return None

    def remove(self, name: str) -> None:
        """Delete an object; nothing happens if there is none. Raises StorageError."""
        with self._translated("removed"):
            self._store.remove(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            raise StorageError(f"{self.url}: cannot be {what} ({_reason(error)})") from error


def _reason(error: Any) -> str:
    """One line; of what a server refused only its code, which holds no name of a key."""
    cause = error.__context__ if getattr(error, "response", None) is None else error
    response = getattr(error, "response", None) or getattr(cause, "response", None)
    if response:
        return str(response.get("Error", {}).get("Code") or "refused")
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
