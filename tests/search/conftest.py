"""A migrated database, and a study that costs nothing to train."""

from __future__ import annotations

import pytest
from toy import make_spec

from headsearch.search import studies
from headsearch.search.database import Database
from headsearch.search.schema import migrate


@pytest.fixture
def database(database_url):
    opened = Database(database_url)
    migrate(opened)
    yield opened
    opened.close()


@pytest.fixture
def make_study(database):
    def make(**changes):
        return studies.create(database, make_spec(**changes))[0]

    return make
