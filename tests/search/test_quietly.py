"""What Optuna says of experimental features, and threads."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
from optuna.exceptions import ExperimentalWarning

from headsearch.search.database import quietly


def test_threads_that_overlap_hear_nothing_and_leave_the_filters_as_they_were() -> None:
    filters = list(warnings.filters)
    heard = []

    def run(index: int) -> None:
        try:
            for count in range(200):
                with quietly():
                    time.sleep(0.0001 * ((index + count) % 4))
                    warnings.warn("experimental", ExperimentalWarning, stacklevel=1)
        except ExperimentalWarning as warning:
            heard.append(warning)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == []
    assert list(warnings.filters) == filters


def test_other_warnings_are_heard() -> None:
    with quietly(), pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)


def test_filters_are_set_back_after_an_error() -> None:
    filters = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), quietly():
        _ = 1 / 0
    assert list(warnings.filters) == filters
