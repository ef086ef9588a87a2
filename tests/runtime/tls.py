"""A PostgreSQL server that encrypts, with certificates made here.

The embedded package's cannot; a distribution's can, such as Debian's `postgresql`.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headsearch.runtime.pgbinaries import Binaries, server_user

PASSWORD = "owner's"


def encrypting_programs() -> Path | None:
    """The folder of a PostgreSQL of 14 or newer that was built to encrypt."""
    places = [
        Path(found).resolve().parent for name in ("postgres", "pg_ctl") if (found := shutil.which(name))
    ]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += sorted(Path("/usr").glob("pgsql-*/bin"), reverse=True)
    for place in places:
        if not all((place / name).is_file() for name in ("postgres", "initdb", "pg_ctl", "pg_config")):
            continue
        programs = Binaries(place, server_user(Path("/nowhere")))
        built = programs.run("pg_config", ["--configure"], timeout=60).stdout
        if ("--with-openssl" in built or "--with-ssl=openssl" in built) and int(
            programs.version().split(".")[0]
        ) >= 14:
            return place
    return None


class Authority:
    """Signs certificates."""

    def __init__(self, name: str, folder: Path) -> None:
        x509 = pytest.importorskip("cryptography.x509")
        from cryptography.hazmat.primitives.asymmetric import ec

        self.x509, self.folder, self.name = x509, folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.crt"
        self._write(self.file, self._sign(self.subject, self.key, [], authority=True))

    def certify(self, name: str, hosts: list[Any]) -> tuple[Path, Path]:
        """Files of a certificate and its key for a server on `hosts`."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = self.x509.Name([self.x509.NameAttribute(self.x509.NameOID.COMMON_NAME, name)])
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        self._write(certificate, self._sign(subject, key, hosts))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private

    def _sign(self, subject: Any, key: Any, hosts: list[Any], *, authority: bool = False) -> Any:
        from cryptography.hazmat.primitives import hashes

        now = dt.datetime.now(dt.UTC)
        builder = (
            self.x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key.public_key())
            .serial_number(self.x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=2))
            .add_extension(self.x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if hosts:
            builder = builder.add_extension(self.x509.SubjectAlternativeName(hosts), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    @staticmethod
    def _write(file: Path, certificate: Any) -> None:
        from cryptography.hazmat.primitives import serialization

        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@dataclass(frozen=True)
class EncryptingServer:
    """It listens on 127.0.0.1, wants TLS, and its certificate is of ``localhost``."""

    port: int
    programs: Path
    authority: Path
    """The certificate that signed the server's."""
    other_authority: Path

    def url(
        self, host: str = "localhost", *, user: str = "headsearch", password: str = PASSWORD, **options: str
    ) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@{host}:{self.port}/postgres?{query}"


@contextmanager
def encrypting_server(folder: Path, place: Path) -> Iterator[EncryptingServer]:
    """A fresh cluster in `folder` by the programs in `place`, stopped and left to be deleted."""
    user = server_user(folder / "data")
    programs = Binaries(place, user)
    x509 = pytest.importorskip("cryptography.x509")
    authority, other = Authority("authority", folder), Authority("other-authority", folder)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("192.0.2.1"))]
    certificate, key = authority.certify("server", names)
    secret, hba = folder / "password", folder / "pg_hba.conf"
    secret.write_text(PASSWORD + "\n")
    hba.write_text("hostssl all all 127.0.0.1/32 scram-sha-256\nhostssl all all ::1/128 scram-sha-256\n")
    data = folder / "data"
    data.mkdir()
    for path, mode in ((secret, 0o600), (hba, 0o600), (certificate, 0o644), (key, 0o600), (data, 0o700)):
        path.chmod(mode)
        if not user.is_me:
            os.chown(path, user.uid, user.gid)
    done = programs.run(
        "initdb",
        [
            "-D",
            str(data),
            "-U",
            "headsearch",
            f"--pwfile={secret}",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--locale=C",
            "-N",
        ],
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "port": port,
        "ssl": "on",
        "ssl_cert_file": certificate,
        "ssl_key_file": key,
        "hba_file": hba,
        "fsync": "off",
    }
    options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
    log = folder / "data" / "server.log"
    started = programs.run(
        "pg_ctl", ["start", "-w", "-t", "200", "-D", str(data), "-l", str(log), "-o", options], timeout=240
    )
    assert started.returncode == 0, log.read_text(errors="replace") if log.exists() else started.stdout
    try:
        yield EncryptingServer(port, place, authority.file, other.file)
    finally:
        programs.run("pg_ctl", ["stop", "-m", "immediate", "-D", str(data)], timeout=120)
