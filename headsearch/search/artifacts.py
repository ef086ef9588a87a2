"""Objects in an S3-compatible store, through Optuna's artifact stores.

Endpoint and credentials are boto3's own environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from optuna.artifacts import Boto3ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from headsearch.errors import StorageError

CONNECT_SECONDS = 10
READ_SECONDS = 60
ATTEMPTS = 4
CREDENTIALS: Final = re.compile(r"[^/\s\"'`@]*@")
REASON_LENGTH: Final = 200
HINTS: Final = {
    "AccessDenied": "it takes GetObject, PutObject and DeleteObject, and ListBucket on the bucket",
    "NoSuchBucket": "there is no such bucket",
}


class Store:
    """A bucket, and a prefix of the names in it."""

    def __init__(self, url: str) -> None:
        """`url` is ``s3://bucket`` or ``s3://bucket/prefix``.

        Raises StorageError where boto3 is missing or its environment cannot be used: on a worker that is the
        machine's fault, not the trial's.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise StorageError(
                f"{_public(url)}: its address must not hold credentials; boto3 takes them from its "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
            )
        if importlib.util.find_spec("boto3") is None:
            raise StorageError(f"{url}: needs boto3, which is not here: pip install 'headsearch[s3]'")
        import boto3
        from botocore.config import Config

        self.url, self.prefix = url, parts.path.strip("/")
        options = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"max_attempts": ATTEMPTS, "mode": "standard"},
            # Many servers beside Amazon's refuse the checksums that boto3 adds since 1.36.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._translated("opened"):
            try:
                client = boto3.session.Session().client("s3", config=options)
            except ValueError as error:  # of an endpoint that is no URL
                raise StorageError(f"{url}: cannot be opened ({_reason(error)})") from error
            # The content is in memory already, so it need not be copied once more.
            self._store = Boto3ArtifactStore(parts.netloc, client, avoid_buf_copy=True)

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Put an object, whole or not at all. Raises StorageError."""
        content = io.BytesIO(b"".join(parts))
        with self._translated("written"):
            self._store.write(self._key(name), content)

    def read(self, name: str) -> bytes | None:
        """Get an object, or None if there is none in the bucket. Raises StorageError."""
        with self._translated("read"):
            try:
                with contextlib.closing(self._store.open_reader(self._key(name))) as body:
                    return body.read()
            except ArtifactNotFound as missing:
                if _code(refusal := missing.__cause__) == "NoSuchBucket" and refusal:
                    raise refusal from None
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


def _code(error: Any) -> str | None:
    """What a server said when it refused, if that is what happened."""
    response = getattr(error, "response", None) or getattr(
        getattr(error, "__context__", None), "response", {}
    )
    return response.get("Error", {}).get("Code") if response else None


def _reason(error: Any) -> str:
    """One line; of what a server refused only its code, which holds no name of a key."""
    code = _code(error)
    said = f"{code}: {HINTS[code]}" if code in HINTS else code or str(error) or type(error).__name__
    return _public(" ".join(said.split()))[:REASON_LENGTH]


def _public(text: str) -> str:
    """`text` without the user and password of any address in it."""
    return CREDENTIALS.sub("", text)
