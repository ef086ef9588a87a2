"""Who may see the dashboard: those who know a login, and those whom an authenticating proxy names."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from headsearch.errors import InputError

LOOPBACK = ("127.0.0.0/8", "::1/128")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]+")
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Visitors:
    """The rule of one dashboard. Without logins and header, all may enter."""

    logins: tuple[tuple[str, str], ...] = ()
    """Users and their passwords."""
    header: str | None = None
    """Names the user, in requests of the proxies."""
    proxies: tuple[_Network, ...] = ()
    """Where requests with that header come from."""

    @property
    def open_to_all(self) -> bool:
        """Nobody is asked who they are."""
        return not self.logins and self.header is None

    def name(self, headers: Message, peer: str) -> str | None:
        """The user that a request from the address `peer` is of, "" where all may enter; None: refuse it."""
        if self.open_to_all:
            return ""
        if self.header is not None and self._is_proxy(peer):
            # By its exact name: proxies that strip X-User from what visitors send let X_User through.
            given = headers.get_all(self.header) or []
            # More than one: the proxy's own, and one that it did not strip.
            if len(given) == 1 and str(given[0]).strip():
                return str(given[0]).strip()
        return self._login(headers.get("Authorization", ""))

    def _login(self, authorization: str) -> str | None:
        scheme, _, token = authorization.partition(" ")
        try:
            given = base64.b64decode(token.strip(), validate=True) if scheme.lower() == "basic" else b""
        except ValueError:
            given = b""
        found = None
        # All are compared, and hashes of one length, so that no answer comes sooner than another.
        for user, password in self.logins:
            if hmac.compare_digest(_digest(given), _digest(f"{user}:{password}".encode())):
                found = user
        return found

    def _is_proxy(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(address in network for network in self.proxies)


def read_visitors(
    auth_file: Path | None = None, trusted_header: str | None = None, trusted_proxies: Sequence[str] = ()
) -> Visitors:
    """The rule that options describe; loopback is a proxy unless others are named.

    Raises InputError that names the option.
    """
    if trusted_proxies and trusted_header is None:
        raise InputError(
            "--trusted-proxy: needs --trusted-header, the header in which the proxy names the user"
        )
    if trusted_header is not None and not _HEADER_NAME.fullmatch(trusted_header):
        raise InputError(
            f"--trusted-header {trusted_header!r}: must be a header's name without underscores, "
            "such as X-Forwarded-User"
        )
    if trusted_header is not None and trusted_header.lower() in ("authorization", "host", "cookie"):
        raise InputError(f"--trusted-header {trusted_header}: visitors send that themselves")
    networks = []
    for proxy in trusted_proxies or (LOOPBACK if trusted_header is not None else ()):
        try:
            networks.append(ipaddress.ip_network(proxy))
        except ValueError as error:
            raise InputError(
                f"--trusted-proxy {proxy}: must be an address or a network such as 10.0.0.0/8"
            ) from error
    return Visitors(read_logins(auth_file) if auth_file else (), trusted_header, tuple(networks))


def read_logins(path: Path) -> tuple[tuple[str, str], ...]:
    """Users and passwords of the file `path`, one ``user:password`` a line. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--auth-file: cannot read {path}") from error
    logins: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        user, _, password = line.strip().partition(":")
        if not (user and password):
            raise InputError(f"--auth-file: line {number} of {path} must be user:password")
        if user in logins:
            raise InputError(f"--auth-file: line {number} of {path} names {user} again")
        logins[user] = password
    if not logins:
        raise InputError(f"--auth-file: {path} must hold user:password, one a line")
    return tuple(logins.items())


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
