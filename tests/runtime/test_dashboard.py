"""The dashboard shows everything and changes nothing, unless it was asked to."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import psycopg2
import pytest
from optuna.storages import RDBStorage

from headsearch.errors import ServeError
from headsearch.runtime.dashboard import DashboardApp, DashboardServer, serve
from headsearch.runtime.database import DatabaseAddress, libpq_url, read_only
from headsearch.runtime.visitors import Visitors, read_visitors

pytestmark = pytest.mark.postgres

SERVE = """
import sys
from headsearch.runtime.dashboard import serve
from headsearch.runtime.database import DatabaseAddress
address = DatabaseAddress(sys.argv[1], sys.argv[2], embedded=True)
serve(address, port=0, ready=lambda url: print(url, flush=True))
"""
WRITES = [
    ("DELETE", "/api/studies/1", {}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}),
    ("POST", "/api/studies/1/rename", {"study_name": "renamed"}),
    ("PUT", "/api/studies/1/note", {"version": 1, "body": "hello"}),
    ("PUT", "/api/studies/1/1/note", {"version": 1, "body": "hello"}),
    ("POST", "/api/trials/1/tell", {"state": "Fail"}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"a": 1}}),
    ("POST", "/incompatible-rdb-schema", {}),
    ("PATCH", "/api/studies/1", {}),
    ("OPTIONS", "/api/studies/1", {}),
    ("delete", "/api/studies/1", {}),
]


class Client:
    """Requests to one dashboard."""

    def __init__(self, url: str) -> None:
        self.netloc = urlsplit(url).netloc

    def __call__(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(self.netloc, timeout=30)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


@contextmanager
def serving(address: DatabaseAddress, **options) -> Iterator[Client]:
    with DashboardServer(DashboardApp(address, **options), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Client(server.url)
        finally:
            server.shutdown()
            thread.join()


def everything(url: str) -> dict[str, list[tuple]]:
    """All rows of all of Optuna's tables."""
    connection = psycopg2.connect(libpq_url(url))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
            tables = [name for (name,) in cursor.fetchall()]
            rows = {}
            for table in tables:
                cursor.execute(f'SELECT t::text FROM "{table}" AS t ORDER BY 1')
                rows[table] = cursor.fetchall()
            return rows
    finally:
        connection.close()


def test_every_page_is_there(pareto_study, database_address: DatabaseAddress) -> None:
    plots = ["slice", "parallel_coordinate", "rank", "edf", "timeline", "pareto_front", "contour"]
    pages = ["/dashboard", "/dashboard/studies/1", "/favicon.ico", "/api/meta", "/api/studies",
             "/api/studies/1", "/api/studies/1?after=5", "/api/studies/1/param_importances", "/csv/1",
             *(f"/api/studies/1/plot/{plot}" for plot in plots)]  # fmt: skip
    before = everything(database_address.url)
    with serving(database_address) as request:
        for page in pages:
            status, headers, body = request("GET", page)
            assert (status, bool(body)) == (200, True), page
            assert headers["X-Content-Type-Options"] == "nosniff"
        status, headers, _ = request("GET", "/")
        assert (status, urlsplit(headers["Location"]).path) == (302, "/dashboard")
        assert "default-src 'self'" in request("GET", "/dashboard")[1]["Content-Security-Policy"]
        status, headers, body = request("HEAD", "/dashboard")
        assert (status, body) == (200, b"")
        study = json.loads(request("GET", "/api/studies/1")[2])
        assert study["name"] == "heads"
        assert len(study["trials"]) == 24
        assert len(study["best_trials"]) == len(pareto_study.best_trials)
        assert request("GET", "/api/studies/2")[0] == 404
        assert b"probe accuracy" in request("GET", "/csv/1")[2]
    assert everything(database_address.url) == before


def test_writes_are_refused(pareto_study, database_address: DatabaseAddress) -> None:
    before = everything(database_address.url)
    with serving(database_address) as request:
        for method, path, body in WRITES:
            status, headers, answer = request(method, path, body)
            assert (status, headers["Allow"]) == (405, "GET, HEAD"), (method, path)
            assert "--writable" in json.loads(answer)["reason"]
            assert answer.count(b"\n") == 1
    assert everything(database_address.url) == before


@pytest.mark.parametrize("reader", ["role", "transactions"])
def test_database_refuses_too(
    pareto_study, database_address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """What slips through the filter fails in the database: its role, or its transactions, only read."""
    monkeypatch.setattr(
        "headsearch.runtime.dashboard._READ_METHODS", ("GET", "HEAD", "DELETE", "POST", "PUT")
    )
    if reader == "transactions":
        database_address = replace(database_address, reader_url=read_only(database_address.url))
    before = everything(database_address.url)
    with serving(database_address) as request:
        assert request("GET", "/api/studies/1")[0] == 200
        for method, path, body in WRITES[:7]:
            assert request(method, path, body)[0] in {400, 500}, (method, path)
    assert everything(database_address.url) == before


def test_writable_dashboard_writes(pareto_study, database_address: DatabaseAddress) -> None:
    with serving(database_address, writable=True) as request:
        assert request("PUT", "/api/studies/1/note", {"version": 1, "body": "a note"})[0] == 204
        assert json.loads(request("GET", "/api/studies/1")[2])["note"]["body"] == "a note"
        assert request("DELETE", "/api/studies/1", {})[0] == 204
    assert everything(database_address.url)["studies"] == []


def test_dashboard_before_the_first_study(database_address: DatabaseAddress) -> None:
    with serving(database_address) as request:
        status, headers, body = request("GET", "/dashboard")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert "no study yet" in json.loads(body)["reason"]
        assert request("GET", "/healthz")[0] == 200
        assert everything(database_address.url) == {}
        optuna.create_study(study_name="first", storage=RDBStorage(database_address.url))
        assert request("GET", "/dashboard")[0] == 200
        assert json.loads(request("GET", "/api/studies")[2])["study_summaries"][0]["study_name"] == "first"


def test_health(pareto_study, database_address: DatabaseAddress, postgres_server) -> None:
    name = urlsplit(database_address.url).path.strip("/")
    with serving(database_address, visitors=Visitors((("u", "p"),))) as request:
        status, _, body = request("GET", "/healthz")
        assert (status, json.loads(body)) == (200, {"reason": "the database answers"})
        assert request("HEAD", "/healthz")[::2] == (200, b"")
        postgres_server.drop_database(name)
        status, _, body = request("GET", "/healthz")
        assert (status, json.loads(body)) == (503, {"reason": "the database does not answer"})


def test_login(pareto_study, database_address: DatabaseAddress) -> None:
    def basic(text: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    wrong = [
        {},
        basic("lab:wrong"),
        basic("lab"),
        basic(""),
        {"Authorization": "Basic ?"},
        {"Authorization": "Bearer x"},
    ]
    with serving(database_address, visitors=Visitors((("lab", "pass:wörd"),))) as request:
        for headers in wrong:
            status, answer, body = request("GET", "/api/studies", headers=headers)
            assert (status, answer["WWW-Authenticate"][:5]) == (401, "Basic")
            assert b"heads" not in body
        assert request("GET", "/api/studies", headers=basic("lab:pass:wörd"))[0] == 200


def test_many_at_once(pareto_study, database_address: DatabaseAddress) -> None:
    with serving(database_address) as request, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: request("GET", "/api/studies/1")[0], range(64)))
    assert answers == [200] * 64


def test_database_restart_is_survived(pareto_study, database_address: DatabaseAddress) -> None:
    with serving(database_address) as request:
        assert request("GET", "/api/studies/1")[0] == 200
        connection = psycopg2.connect(libpq_url(database_address.url))
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                           " WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
            assert (True,) in cursor.fetchall()
        connection.close()
        assert request("GET", "/api/studies/1")[0] == 200


def test_address_that_cannot_be_used(database_address: DatabaseAddress) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ServeError, match=f"port {port} on 127.0.0.1 is in use: choose another with --port"
        ):
            serve(database_address, port=port)
    with pytest.raises(ServeError, match="--port 70000: must be between 0 and 65535"):
        serve(database_address, port=70000)
    for host in ("192.0.2.1", "nowhere.invalid"):
        with pytest.raises(ServeError, match=f"cannot listen on {host}: .*--host"):
            serve(database_address, host=host, port=0)


def test_open_address_without_login_is_warned_about(
    database_address: DatabaseAddress, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(url: str) -> None:
        urls.append(url)
        raise Stop

    urls: list[str] = []
    login = tmp_path / "login"
    login.write_text("lab:word")
    for options, warned in (({"visitors": read_visitors(login)}, False), ({}, True)):
        with caplog.at_level(logging.WARNING), pytest.raises(Stop):
            serve(database_address, host="0.0.0.0", port=0, ready=stop, **options)
        assert ("has no login" in caplog.text) == warned
    assert all(url.startswith("http://127.0.0.1:") for url in urls)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(
    pareto_study, database_address: DatabaseAddress, subprocess_env: dict[str, str], how: signal.Signals
) -> None:
    command = [sys.executable, "-c", SERVE, database_address.url, database_address.reader_url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=subprocess_env, **pipes) as process:
        request = Client(process.stdout.readline().strip())
        assert request("GET", "/api/studies/1")[0] == 200
        assert request("DELETE", "/api/studies/1")[0] == 405
        process.send_signal(how)
        output = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, ("", ""))


def test_serve_in_a_thread(pareto_study, database_address: DatabaseAddress) -> None:
    """Signal handlers belong to the main thread; elsewhere `serve` leaves them alone."""
    before = signal.getsignal(signal.SIGTERM)
    urls: list[str] = []
    thread = threading.Thread(
        target=serve, args=(database_address, "127.0.0.1", 0), kwargs={"ready": urls.append}, daemon=True
    )
    thread.start()
    while not urls and thread.is_alive():
        thread.join(0.02)
    assert Client(urls[0])("GET", "/healthz")[0] == 200
    assert signal.getsignal(signal.SIGTERM) is before
