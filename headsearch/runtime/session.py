"""What a command works with: the home folder and the database, open for as long as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headsearch.errors import AccessError
from headsearch.home import home_folder
from headsearch.runtime.database import DatabaseAddress, open_database
from headsearch.search.database import Database
from headsearch.search.schema import migrate


@dataclass(frozen=True)
class Session:
    """Home folder and database of one command."""

    home: Path
    address: DatabaseAddress
    database: Database
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def revive(self) -> None:
        """Start the embedded server again if it died; a server elsewhere is its owner's to start.

        It comes back on the port it had, so that open connections' addresses stay right.
        """
        if self.address.embedded:
            self._stack.enter_context(open_database(self.home))


@contextmanager
def open_session(*, tables: bool = True) -> Iterator[Session]:
    """The session, with the database's tables made or brought up to date.

    Args:
        tables: False to go on without, where the URL's role may not make them.

    Raises:
        StorageError: The home folder cannot be made or written.
        AccessError: Tables are missing or of an older headsearch, and the URL's role may not make them.
        DatabaseError: The database does not answer, or is of a newer headsearch.
    """
    home = home_folder()
    with ExitStack() as stack:
        address = stack.enter_context(open_database(home))
        database = Database(address.url, address.password_file)
        # Connections go before the server does, which the stack holds below.
        stack.callback(database.close)
        try:
            migrate(database)
        except AccessError:
            if tables:
                raise
        yield Session(home, address, database, stack)
