from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
import pytest
from fabricated import snapshot, trial

from headsearch.errors import InputError, StorageError, WorldError
from headsearch.report import figures, publish
from headsearch.report.figures import front_figure, save_figure

MLP = {"head.kind": "mlp", "head.width": 32, "head.projection_dim": 2}


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data}


def read(**changes):
    return snapshot(
        trial(0, dim=8, acc=0.9), trial(1, dim=16, acc=0.8), trial(2, dim=2, acc=0.5, params=MLP),
        trial(3, "pruned", dim=4, acc=0.4), trial(4, "running"), trial(5, "failed", dim=None, acc=None, reason="error"),
        **changes,
    )  # fmt: skip


def test_points_stand_by_head_kind_and_the_front_is_a_step_line() -> None:
    found = traces(front_figure(read()))
    assert set(found) == {"head: linear", "head: mlp", "pruned, at its last report", "front"}
    assert (found["head: linear"].x, found["head: linear"].y) == ((8, 16), (0.9, 0.8))
    assert found["head: mlp"].x == (2,)
    assert (found["pruned, at its last report"].x, found["pruned, at its last report"].y) == ((4,), (0.4,))
    assert found["pruned, at its last report"].marker.opacity < 0.5
    line = found["front"]
    assert (line.x, line.y, line.line.shape) == ((2, 8), (0.5, 0.9), "hv")
    colours = {found[f"head: {kind}"].marker.color for kind in ("linear", "mlp")}
    assert len(colours) == 2
    assert "width=32" in found["head: mlp"].text[0]


def test_axes_are_named() -> None:
    layout = front_figure(read()).layout
    assert layout.xaxis.type == "log"
    assert "projection dim" in layout.xaxis.title.text
    assert "validation" in layout.yaxis.title.text
    assert tuple(layout.xaxis.tickvals) == (2, 4, 8, 16)
    assert "holdout" in layout.title.text


def test_seeds_have_error_bars_and_head_kind_may_stand_under_base() -> None:
    seeds = snapshot(
        trial(0, acc=0.8, params={"head.projection_dim": 8}),
        trial(1, acc=0.9, seed=1, params={"head.projection_dim": 8}),
        seeds=[0, 1], base={"head": {"kind": "linear"}}, space={"head.projection_dim": [4, 8, 16, 32, 64, 128]},
    )  # fmt: skip
    found = traces(front_figure(seeds))
    assert set(found) == {"head: linear", "front (mean of seeds)"}
    assert found["front (mean of seeds)"].y == (0.85,)
    assert found["front (mean of seeds)"].error_y.array == (0.07071,)


def test_points_that_lack_seeds_are_hollow_and_seeds_are_not_drawn_one_by_one() -> None:
    drawn = snapshot(
        trial(0, dim=8, acc=0.8), trial(1, dim=8, acc=0.9, seed=1),
        trial(2, dim=4, acc=0.7), trial(3, "failed", dim=4, acc=None, seed=1, reason="lost"),
        trial(4, "pruned", dim=16, acc=0.3), trial(5, "pruned", dim=16, acc=0.5, seed=1),
        trial(6, dim=32, acc=0.9), trial(7, "running", dim=32, acc=0.9, seed=1), seeds=[0, 1],
    )  # fmt: skip
    figure = front_figure(drawn)
    found = traces(figure)
    assert set(found) == {
        "head: linear", "head: linear, seeds missing", "pruned, at its last report", "front (mean of seeds; 1 lack seeds)",
    }  # fmt: skip
    assert (found["head: linear"].x, found["head: linear"].y) == ((8,), (0.85,))
    assert "trials 0, 1, mean of 2 seeds" in found["head: linear"].text[0]
    assert found["head: linear, seeds missing"].marker.symbol == "diamond-open"
    assert "mean of 1 of 2 seeds" in found["head: linear, seeds missing"].text[0]
    assert found["pruned, at its last report"].y == (0.4,)
    assert "n = 1 of 2" in found["front (mean of seeds; 1 lack seeds)"].text[0]
    assert "2 complete points of 2 seeds" in figure.layout.title.text


def test_a_study_without_trials_is_drawn_empty() -> None:
    assert front_figure(snapshot()).data == ()


def test_html_holds_plotly_itself(tmp_path: Path) -> None:
    save_figure(front_figure(read()), tmp_path / "front.html")
    text = (tmp_path / "front.html").read_text()
    assert len(text) > 3_000_000
    assert "<script src=" not in text
    assert "projection dim" in text


@pytest.mark.parametrize("name", ["front.gif", "front", "missing/front.html"])
def test_a_name_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--figure"):
        save_figure(front_figure(read()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_a_browser_the_error_names_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    with pytest.raises(WorldError, match=r"needs Chrome or Chromium.*use a name ending in \.html") as caught:
        save_figure(front_figure(read()), tmp_path / "front.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "front.html").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        save_figure(front_figure(read()), tmp_path / "front.html")


@pytest.mark.browser
def test_png_is_drawn(tmp_path: Path) -> None:
    save_figure(front_figure(read()), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_published_stays_small() -> None:
    params = {"head.kind": "linear"} | {f"head.made_up_{n}": "a long value" for n in range(10)}
    many = snapshot(
        *(trial(n, dim=n % 60 + 2, acc=n / 5000, params={**params, "n": n}) for n in range(1200)),
        *(trial(n, "pruned", dim=n % 60 + 2, acc=n / 5000) for n in range(1200, 4000)),
    )
    assert len(front_figure(many).to_json()) > publish.MOST_FIGURE_BYTES
    small = publish.small_figure(many)
    assert len(small.to_json()) <= publish.MOST_FIGURE_BYTES
    assert sum(len(t.x) for t in small.data if t.name.startswith("head")) == 1200
    # Coordinates as plain lists: the dashboard's plotly.js need not know plotly 6's packed arrays.
    assert all(isinstance(trace["x"], list) for trace in json.loads(small.to_json())["data"])


def test_the_note_has_what_a_reader_asks() -> None:
    text = publish.note(read(state="complete"))
    for words in (
        "# made-up", "How small?", "protocol holdout", read().study.spec.hash, "seeds 0", "3 complete", "1 pruned",
        "epochs trained", "| projection_dim | validation | test |", "| 8 | 0.9000 | 0.8900 |", "- error: trial 5",
    ):  # fmt: skip
        assert words in text
    assert "No trial is complete yet." in publish.note(snapshot())


def test_colours_suffice_for_the_kinds_of_head() -> None:
    assert len(set(figures.COLOURS)) >= 4
