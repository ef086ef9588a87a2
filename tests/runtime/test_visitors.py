"""Who may see the dashboard, asked through HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from pathlib import Path

import pytest
from processes import Command
from test_dashboard import serving
from test_worker import wait_for

from headsearch.cli.app import run
from headsearch.errors import InputError
from headsearch.runtime.database import DatabaseAddress
from headsearch.runtime.visitors import Visitors, read_logins, read_visitors

pytestmark = pytest.mark.postgres

USER = "X-Forwarded-User"


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def raw(netloc: str, *headers: str, method: str = "GET", path: str = "/api/studies") -> int:
    """The status of a request with these header lines as they are."""
    host, port = netloc.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {netloc}", "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status


def test_each_line_of_the_file_is_a_login(
    pareto_study, database_address: DatabaseAddress, tmp_path: Path
) -> None:
    file = tmp_path / "logins"
    file.write_text("# the lab\nann:pass:wörd\n\nbob:word\n")
    with serving(database_address, visitors=read_visitors(file)) as request:
        for login in ("ann:pass:wörd", "bob:word"):
            assert request("GET", "/api/studies", headers=basic(login))[0] == 200
        for login in (
            "ann:word",
            "bob:pass:wörd",
            "bob",
            "bob:",
            ":",
            "",
            "# the lab",
            "ann:pass",
            "carl:word",
        ):
            status, headers, body = request("GET", "/api/studies", headers=basic(login))
            assert (status, headers["WWW-Authenticate"][:5]) == (401, "Basic"), login
            assert b"heads" not in body
        assert request("GET", "/healthz")[0] == 200
        # Nobody is let in by a header that no option names.
        assert request("GET", "/api/studies", headers={USER: "ann"})[0] == 401


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold user:password, one a line"),
        ("# nobody\n\n", "must hold user:password, one a line"),
        ("lab", "line 1 of .* must be user:password"),
        ("lab:word\nlab2:", "line 2 of .* must be user:password"),
        (":word", "line 1 of .* must be user:password"),
        ("lab:one\nlab:two\n", "line 2 of .* names lab again"),
    ],
)
def test_files_without_logins_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "logins"
    file.write_text(text)
    with pytest.raises(InputError, match=f"--auth-file: .*{reason}") as caught:
        read_logins(file)
    assert "word" not in str(caught.value).replace("user:password", "")
    with pytest.raises(InputError, match="--auth-file: cannot read"):
        read_logins(tmp_path / "absent")


def test_a_proxy_in_front_names_the_user(pareto_study, database_address: DatabaseAddress) -> None:
    with serving(database_address, visitors=read_visitors(None, USER)) as request:
        status, headers, body = request("GET", "/api/studies")
        assert (status, headers["WWW-Authenticate"]) == (401, None)
        assert json.loads(body) == {"reason": f"come through the proxy that sets {USER}"}
        assert request("GET", "/healthz")[0] == 200
        assert request("GET", "/api/studies", headers={USER: "ann"})[0] == 200
        assert request("GET", "/api/studies", headers={USER.lower(): "ann"})[0] == 200
        for value in ("", "   "):
            assert request("GET", "/api/studies", headers={USER: value})[0] == 401
        assert raw(request.netloc, f"{USER}: ann") == 200
        # What a visitor may send past a proxy that strips the header by its name.
        assert raw(request.netloc, "X_Forwarded_User: ann") == 401
        assert raw(request.netloc, "X-Forwarded_User: ann") == 401
        assert raw(request.netloc, f"{USER}: mallory", f"{USER}: ann") == 401
        assert raw(request.netloc, "X-Forwarded-Userx: ann") == 401
        # It stays read-only.
        assert request("DELETE", "/api/studies/1", headers={USER: "ann"})[0] == 405


def test_the_header_counts_from_the_proxy_only(
    pareto_study, database_address: DatabaseAddress, tmp_path: Path
) -> None:
    elsewhere = read_visitors(None, USER, ["10.0.0.0/8", "fd00::/8"])
    with serving(database_address, visitors=elsewhere) as request:
        assert request("GET", "/api/studies", headers={USER: "ann"})[0] == 401
    with serving(
        database_address, visitors=read_visitors(None, USER, ["10.0.0.0/8", "127.0.0.1"])
    ) as request:
        assert request("GET", "/api/studies", headers={USER: "ann"})[0] == 200
    # With logins beside it, whoever comes past the proxy is asked for one.
    file = tmp_path / "logins"
    file.write_text("bob:word\n")
    with serving(database_address, visitors=read_visitors(file, USER, ["10.0.0.0/8"])) as request:
        assert request("GET", "/api/studies", headers={USER: "ann"})[0] == 401
        assert request("GET", "/api/studies", headers=basic("bob:word"))[0] == 200


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_loopback_is_the_proxy_unless_told(peer: str, trusted: bool) -> None:
    from email.message import Message

    headers = Message()
    headers[USER] = "ann"
    assert read_visitors(None, USER).name(headers, peer) == ("ann" if trusted else None)
    assert Visitors().name(headers, peer) == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--trusted-proxy", "10.0.0.0/8"], "--trusted-proxy: needs --trusted-header"),
        (
            ["--trusted-header", "X_User"],
            "--trusted-header 'X_User': must be a header's name without underscores",
        ),
        (["--trusted-header", ""], "--trusted-header '': must be a header's name"),
        (["--trusted-header", "X User"], "--trusted-header 'X User': must be"),
        (
            ["--trusted-header", "Authorization"],
            "--trusted-header Authorization: visitors send that themselves",
        ),
        (
            ["--trusted-header", USER, "--trusted-proxy", "10.0.0.1/8"],
            "--trusted-proxy 10.0.0.1/8: must be an address",
        ),
        (["--trusted-header", USER, "--trusted-proxy", "proxy"], "--trusted-proxy proxy: must be an address"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], reason: str, capsys, headsearch_home
) -> None:
    assert run(["dashboard", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {reason}")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_command_serves_behind_a_proxy_and_says_who_changes_what(
    pareto_study, database_address: DatabaseAddress, monkeypatch, headsearch_home
) -> None:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_address.url)
    dashboard = Command("dashboard", "--port", "0", "--writable", "--trusted-header", USER)
    try:
        wait_for(lambda: "dashboard on http" in dashboard.said or dashboard.returncode is not None)
        netloc = dashboard.said.split("http://")[1].split("/")[0]
        assert raw(netloc) == 401
        assert raw(netloc, f"{USER}: ann") == 200
        assert raw(netloc, method="DELETE", path="/api/studies/1") == 401
        assert (
            raw(netloc, f"{USER}: ann\x1b[2J", "Content-Length: 0", method="DELETE", path="/api/studies/1")
            == 204
        )
        wait_for(lambda: r"DELETE '/api/studies/1' by 'ann\x1b[2J'" in dashboard.said)
    finally:
        dashboard.send_signal(15)
        output, _ = dashboard.communicate(timeout=60)
    assert dashboard.returncode == 0, output
    assert "\x1b" not in output
