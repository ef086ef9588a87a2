"""The dashboard's Pareto page in a real browser shows the study's trials, and cannot change them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from optuna.trial import TrialState

from headsearch.runtime.database import DatabaseAddress

if TYPE_CHECKING:
    from optuna import Study
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.postgres]

SERVE = """
import sys
from headsearch.runtime.dashboard import serve
from headsearch.runtime.database import DatabaseAddress
address = DatabaseAddress(sys.argv[1], sys.argv[2], embedded=True)
serve(address, port=0, ready=lambda url: print(url, flush=True))
"""
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--no-default-browser-check",
]  # fmt: skip
GRAPH = "#graph-pareto-front"
READ_TRACES = """
graph => graph.data.map(trace => [...(trace.x ?? [])].map((x, i) => [x ?? null, trace.y[i] ?? null]))
"""
TRY_WRITES = """
writes => Promise.all(writes.map(async ([method, path, body]) => {
    const headers = {"Content-Type": "application/json"};
    return (await fetch(path, {method, headers, body: JSON.stringify(body)})).status;
}))
"""
WRITES = [
    ("DELETE", "/api/studies/1", {}),
    ("POST", "/api/studies/1/rename", {"study_name": "renamed"}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}),
    ("POST", "/api/trials/1/tell", {"state": "Fail"}),
    ("PUT", "/api/studies/1/note", {"version": 1, "body": "hello"}),
]


@pytest.fixture
def dashboard_url(
    pareto_study: Study, database_address: DatabaseAddress, subprocess_env: dict[str, str]
) -> Iterator[str]:
    """A dashboard in a process of its own, as users run it."""
    command = [sys.executable, "-c", SERVE, database_address.url, database_address.reader_url]
    with subprocess.Popen(command, text=True, env=subprocess_env, stdout=subprocess.PIPE) as process:
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture
def page(chromium: str) -> Iterator[Page]:
    """A page that fails its test when the browser blocks something or a script throws."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
        refused = [error for error in errors if "405" not in error]
        assert not refused


def frozen(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.values, t.params, t.user_attrs) for t in study.get_trials()]


def test_pareto_page(page: Page, dashboard_url: str, pareto_study: Study, tmp_path: Path) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{dashboard_url}/dashboard/studies/1")
    page.wait_for_selector(f"{GRAPH} path.point")
    complete = pareto_study.get_trials(states=[TrialState.COMPLETE])
    assert len(complete) == 20
    assert page.locator(f"{GRAPH} path.point").count() == len(complete)

    *others, front = page.eval_on_selector(GRAPH, READ_TRACES)
    drawn = [tuple(point) for trace in [*others, front] for point in trace if None not in point]
    assert sorted(drawn) == sorted(tuple(trial.values) for trial in complete)
    assert sorted(map(tuple, front)) == sorted(tuple(trial.values) for trial in pareto_study.best_trials)
    chosen = page.locator("[role=combobox]").all_inner_texts()
    assert chosen[:2] == ["probe accuracy", "projection dim"]

    screenshot = tmp_path / "pareto.png"
    page.screenshot(path=screenshot)
    assert screenshot.stat().st_size > 10_000
    assert all(url.startswith((dashboard_url, "data:", "blob:")) for url in requests), requests


def test_page_cannot_change_the_study(page: Page, dashboard_url: str, pareto_study: Study) -> None:
    before = frozen(pareto_study)
    page.goto(f"{dashboard_url}/dashboard/studies/1")
    page.wait_for_selector(f"{GRAPH} path.point")
    assert page.evaluate(TRY_WRITES, WRITES) == [405] * len(WRITES)
    assert frozen(pareto_study) == before
    studies = page.evaluate("() => fetch('/api/studies').then(answer => answer.text())")
    assert [study["study_name"] for study in json.loads(studies)["study_summaries"]] == ["heads"]


def test_delete_button_of_the_study_list_fails(page: Page, dashboard_url: str, pareto_study: Study) -> None:
    before = frozen(pareto_study)
    page.goto(f"{dashboard_url}/dashboard")
    page.get_by_role("button", name="Delete").or_(page.get_by_label("delete study")).first.click()
    with page.expect_response(lambda response: response.request.method == "DELETE") as answer:
        page.get_by_role("button", name="Yes").click()
    assert answer.value.status == 405
    assert frozen(pareto_study) == before
