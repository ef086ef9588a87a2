"""Who may do what in the database: its owner everything, a worker what workers do, a reader read.

The table below is the whole of it. `headsearch db migrate` makes the two roles, and every migration applies
the table again where they exist. What PostgreSQL gives to every role (connecting, temporary tables, large
objects, tables in `public` before version 15) is taken from all but the owner by `close_doors`.

Left to every role, since PostgreSQL cannot take it: changing its own password and settings, advisory locks,
and seeing the names of roles and databases.
"""

from __future__ import annotations

import time
from typing import Any

from psycopg2.extensions import encrypt_password
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from headsearch.errors import AccessError, InputError
from headsearch.search.database import LOCK_SCHEMA, Database, translated

WORKER = "headsearch_worker"
READER = "headsearch_reader"

WORKER_MAY: dict[str, tuple[str, ...]] = {
    # Optuna's. FOR UPDATE needs UPDATE of some column; study_id is the one that foreign keys hold in place.
    "public.studies": ("SELECT", "UPDATE (study_id)"),
    "public.study_directions": ("SELECT",),
    "public.study_user_attributes": ("SELECT",),
    # Figure and note of the dashboard.
    "public.study_system_attributes": ("SELECT", "INSERT", "UPDATE (value_json)"),
    "public.trials": ("SELECT", "INSERT", "UPDATE (number, state, datetime_complete)"),
    "public.trial_params": ("SELECT", "INSERT"),
    "public.trial_values": ("SELECT", "INSERT"),
    "public.trial_user_attributes": ("SELECT", "INSERT", "UPDATE (value_json)"),
    "public.trial_system_attributes": ("SELECT", "INSERT", "UPDATE (value_json)"),
    "public.trial_intermediate_values": ("SELECT",),
    "public.trial_heartbeats": ("SELECT",),
    "public.version_info": ("SELECT",),
    "public.alembic_version": ("SELECT",),
    # Ours.
    "headsearch.migrations": ("SELECT",),
    "headsearch.studies": ("SELECT", "UPDATE (state, completed_at)"),
    "headsearch.trials": (
        "SELECT",
        "INSERT",
        "UPDATE (trial_id, state, rung, epoch, attempt, worker_id, device, lease_until, losses, history)",
        "UPDATE (projection_dim, head_parameters, outcome, finished_at)",
    ),
    "headsearch.reports": ("SELECT", "INSERT"),
    "headsearch.images": ("SELECT", "INSERT"),
    "headsearch.workers": ("SELECT", "INSERT", "UPDATE (beat_at, ended_at)"),
}
READER_MAY: dict[str, tuple[str, ...]] = dict.fromkeys(WORKER_MAY, ("SELECT",))

# Large objects are the one thing that PostgreSQL lets every role create.
CREATE_LARGE_OBJECTS = ("lo_creat(integer)", "lo_create(oid)", "lo_from_bytea(oid, bytea)")


def _granting(role: str, may: dict[str, tuple[str, ...]]) -> str:
    """SQL that gives a role this and nothing else on our tables, where there is such a role."""
    grants = "\n".join(f"GRANT {', '.join(what)} ON {table} TO {role};" for table, what in may.items())
    tables = ", ".join(f"'{table}'::regclass" for table in may)
    inserted = ", ".join(["0", *(f"'{table}'::regclass" for table, what in may.items() if "INSERT" in what)])
    # Sequences: to read, for a backup; to use, for the numbers of rows that may be inserted.
    return f"""
        DO $grants$ DECLARE sequence record; BEGIN
        IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname = '{role}') THEN
        GRANT USAGE ON SCHEMA public, headsearch TO {role};
        REVOKE ALL ON {", ".join(may)} FROM {role};
        {grants}
        FOR sequence IN SELECT objid::regclass AS name, refobjid IN ({inserted}) AS used
            FROM pg_depend JOIN pg_class c ON c.oid = objid
            WHERE relkind = 'S' AND deptype IN ('a', 'i') AND refobjid IN ({tables})
        LOOP
            EXECUTE 'REVOKE ALL ON SEQUENCE ' || sequence.name || ' FROM {role}';
            EXECUTE 'GRANT SELECT ON SEQUENCE ' || sequence.name || ' TO {role}';
            IF sequence.used THEN
                EXECUTE 'GRANT USAGE ON SEQUENCE ' || sequence.name || ' TO {role}';
            END IF;
        END LOOP;
        END IF; END $grants$
        """  # noqa: S608 - of the constants above


GRANTS: tuple[str, ...] = (_granting(WORKER, WORKER_MAY), _granting(READER, READER_MAY))
"""For the tables' owner to run, under the lock of the schema; all tables must be there."""


def set_password(database: Database, role: str, password: str) -> bool:
    """Make a role that may log in, or give the one that is there this password; True when it is new.

    The server gets a SCRAM verifier, from which no log of statements gives the password away. Connections
    that are open stay open.

    Raises:
        AccessError: The database's role may not make roles, or not alter this one.
        InputError: The role that is there has rights that are not taken from it.
        DatabaseError: Not reachable.
    """
    for attempt in range(10):
        try:
            with database.engine.begin() as connection:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_SCHEMA})
                return _set_password(connection, role, password)
        except DBAPIError as error:
            code = getattr(error.orig, "pgcode", None)
            if code == "42501":
                user = database.engine.url.username
                raise AccessError(
                    f"role {user} may not make or alter {role}: have an administrator run ALTER ROLE {user} "
                    f"CREATEROLE, or make the role and run headsearch db migrate without its password file"
                ) from error
            # Roles are of the whole server, our lock is of one database.
            if code not in ("XX000", "23505", "42710") or attempt == 9:
                with translated():
                    raise
            time.sleep(0.1 * attempt)
    raise AssertionError  # the last attempt returns or raises


def _set_password(connection: Connection, role: str, password: str) -> bool:
    found = connection.execute(
        text(
            "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls AS strong, "
            "ARRAY(SELECT roleid::regrole::text FROM pg_auth_members WHERE member = r.oid) AS groups "
            "FROM pg_roles r WHERE rolname = :role"
        ),
        {"role": role},
    ).one_or_none()
    if found and (found.strong or found.groups):
        why = f"a member of {', '.join(found.groups)}" if found.groups else "allowed more than to log in"
        raise InputError(f"role {role} is there and is {why}: take that from it, or drop it, and run again")
    if not found:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
    plain: Any = connection.connection.dbapi_connection
    # Base64 and a few signs, none of which a literal would need to escape.
    verifier = encrypt_password(password, role, plain, "scram-sha-256")
    connection.exec_driver_sql(f"ALTER ROLE {role} LOGIN PASSWORD '{verifier}'")
    if role == READER:
        connection.exec_driver_sql(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    return not found


def apply_grants(database: Database) -> list[str]:
    """Give the roles that are there what they may, and nobody else anything; returns their names.

    Raises:
        AccessError: The database's role does not own our tables.
        DatabaseError: Not reachable.
    """
    with database.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_SCHEMA})
        owner = connection.execute(
            text(
                "SELECT pg_get_userbyid(relowner) AS name, pg_has_role(relowner, 'USAGE') AS ours, "
                "current_user AS me FROM pg_class WHERE oid = 'headsearch.migrations'::regclass"
            )
        ).one()
        if not owner.ours:
            raise AccessError(f"role {owner.me} may not do this: it is for the tables' owner, {owner.name}")
        there = list(
            connection.scalars(
                text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:roles) ORDER BY rolname DESC"),
                {"roles": [WORKER, READER]},
            )
        )
        for statement in GRANTS:
            connection.exec_driver_sql(statement)
        if there:
            close_doors(connection, there)
    return there


def close_doors(connection: Connection, roles: list[str]) -> None:
    """Take from everybody what PostgreSQL gives to everybody in this database, as far as we own it."""
    name = connection.scalar(text("SELECT quote_ident(current_database())"))
    for statement in (
        f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {name} TO {', '.join(roles)}",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        *(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC" for function in CREATE_LARGE_OBJECTS),
    ):
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(statement)
        except DBAPIError as error:
            # Somebody else's; `open_doors` tells what is left open.
            if getattr(error.orig, "pgcode", None) != "42501":
                raise


def open_doors(database: Database, role: str) -> list[str]:
    """What a role may do beside its grants, each with what closes it; for people to read."""
    with database.begin() as connection:
        found = connection.execute(
            text(
                """
                SELECT quote_ident(current_database()) AS name,
                    has_database_privilege(:role, current_database(), 'CONNECT') AS enters,
                    has_database_privilege(:role, current_database(), 'TEMP') AS temporary,
                    has_schema_privilege(:role, 'public', 'CREATE') AS makes,
                    has_function_privilege(:role, 'pg_catalog.lo_create(oid)', 'EXECUTE') AS objects,
                    ARRAY(SELECT quote_ident(datname) FROM pg_database
                        WHERE datallowconn AND datname <> current_database()
                        AND has_database_privilege(:role, oid, 'CONNECT') ORDER BY datname) AS others
                """
            ),
            {"role": role},
        ).one()
    lines = []
    if not found.enters:
        lines.append(f"{role} may not connect: GRANT CONNECT ON DATABASE {found.name} TO {role}")
    if found.temporary:
        lines.append(
            f"{role} may make temporary tables: REVOKE TEMPORARY ON DATABASE {found.name} FROM PUBLIC"
        )
    if found.makes:
        lines.append(f"{role} may make tables: REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    if found.objects:
        functions = ", ".join(CREATE_LARGE_OBJECTS)
        lines.append(f"{role} may make large objects: REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC")
    lines += [
        f"{role} may connect to database {other}: REVOKE CONNECT ON DATABASE {other} FROM PUBLIC"
        for other in found.others
    ]
    return lines
