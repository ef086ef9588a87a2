"""Our tables, beside Optuna's in the same database, and how they come to be.

Both sets are made once, under an advisory lock: eight workers that open an empty database together
would otherwise race Optuna's own CREATE TABLE and most would die. Workers then open the database
without checking it again. Migrations are numbered, run forward, and never edited once released.
"""

from __future__ import annotations

from optuna.storages import RDBStorage
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from headsearch import __version__
from headsearch.errors import AccessError, DatabaseError
from headsearch.search.database import LOCK_SCHEMA, Database, quietly
from headsearch.search.roles import GRANTS

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE headsearch.studies (
        study_id integer PRIMARY KEY REFERENCES public.studies (study_id) ON DELETE CASCADE,
        name text NOT NULL UNIQUE,
        spec json NOT NULL,
        spec_hash text NOT NULL,
        protocol text NOT NULL,
        state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'complete')),
        version text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        completed_at timestamptz,
        CHECK ((state = 'complete') = (completed_at IS NOT NULL))
    );

    -- spec and params are json, not jsonb, which would forget the order of the space.
    -- One row per trial, written in the transaction that claims it for the first time.
    -- attempt is the fencing token: it rises with every claim, and every write of a worker names it.
    CREATE TABLE headsearch.trials (
        study_id integer NOT NULL REFERENCES headsearch.studies ON DELETE CASCADE,
        number integer NOT NULL,
        trial_id integer NOT NULL UNIQUE,
        point_key text NOT NULL,
        seed bigint NOT NULL,
        params json NOT NULL,
        state text NOT NULL DEFAULT 'running'
            CHECK (state IN ('running', 'paused', 'complete', 'pruned', 'failed')),
        rung integer NOT NULL DEFAULT 0,
        epoch integer NOT NULL DEFAULT 0,
        attempt integer NOT NULL DEFAULT 1,
        losses integer NOT NULL DEFAULT 0,
        worker_id text,
        device text,
        lease_until timestamptz,
        projection_dim integer,
        head_parameters bigint,
        outcome jsonb,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz,
        PRIMARY KEY (study_id, number),
        UNIQUE (study_id, point_key, seed),
        CHECK ((state = 'running') = (lease_until IS NOT NULL)),
        CHECK ((state IN ('complete', 'pruned', 'failed')) = (finished_at IS NOT NULL)),
        CHECK (state NOT IN ('complete', 'pruned', 'failed') OR outcome IS NOT NULL)
    );
    CREATE INDEX trials_by_state ON headsearch.trials (study_id, state);

    CREATE TABLE headsearch.reports (
        study_id integer NOT NULL,
        number integer NOT NULL,
        epoch integer NOT NULL,
        loss double precision NOT NULL,
        probe_accuracy double precision NOT NULL,
        feature_rank double precision NOT NULL,
        projection_rank double precision NOT NULL,
        views_per_second double precision NOT NULL,
        train_seconds double precision NOT NULL,
        attempt integer NOT NULL,
        reported_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (study_id, number, epoch),
        FOREIGN KEY (study_id, number) REFERENCES headsearch.trials ON DELETE CASCADE
    );
    CREATE INDEX reports_by_epoch ON headsearch.reports (study_id, epoch) INCLUDE (number, probe_accuracy);

    CREATE TABLE headsearch.workers (
        worker_id text PRIMARY KEY,
        study_id integer NOT NULL REFERENCES headsearch.studies ON DELETE CASCADE,
        host text NOT NULL,
        pid integer NOT NULL,
        device text NOT NULL,
        threads integer NOT NULL,
        version text NOT NULL,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        beat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        ended_at timestamptz
    );
    CREATE INDEX workers_by_study ON headsearch.workers (study_id);
    """,
    """
    -- Named numbers beside the accuracy: kNN accuracy, alignment, inactive head units, ...
    ALTER TABLE headsearch.reports ADD COLUMN measures jsonb NOT NULL DEFAULT '{}';
    """,
    """
    -- uid names a study's checkpoints: two databases may have studies of the same name on one disk.
    ALTER TABLE headsearch.studies
        ADD COLUMN uid text NOT NULL DEFAULT left(gen_random_uuid()::text, 8),
        DROP CONSTRAINT studies_state_check,
        DROP CONSTRAINT studies_check,
        ADD CONSTRAINT studies_state_check CHECK (state IN ('open', 'paused', 'complete', 'cancelled')),
        ADD CONSTRAINT studies_end_check
            CHECK ((state IN ('complete', 'cancelled')) = (completed_at IS NOT NULL));

    -- history: what went wrong and was tried again, oldest first. A failed trial that is trained again keeps
    -- its row; the point then has a new trial, so only rows that were not requeued are unique.
    ALTER TABLE headsearch.trials
        ADD COLUMN history jsonb NOT NULL DEFAULT '[]',
        ADD COLUMN requeued boolean NOT NULL DEFAULT false,
        ADD CONSTRAINT trials_requeued_check CHECK (NOT requeued OR state = 'failed'),
        DROP CONSTRAINT trials_study_id_point_key_seed_key;
    CREATE UNIQUE INDEX trials_by_point ON headsearch.trials (study_id, point_key, seed) WHERE NOT requeued;
    CREATE INDEX trials_by_worker ON headsearch.trials (worker_id) WHERE state = 'running';
    """,
    """
    -- The images of a study, a row for each configuration of `data`; whoever comes first with one records it.
    CREATE TABLE headsearch.images (
        study_id integer NOT NULL REFERENCES headsearch.studies ON DELETE CASCADE,
        data text NOT NULL,
        fingerprint text NOT NULL,
        counts jsonb NOT NULL DEFAULT '{}',
        recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (study_id, data)
    );
    """,
    """
    -- Optuna's trial is a point, and the seeds of the point are our rows below it. Before, each seed had one
    -- of its own, which paused, ended and was told by itself: the point's is now that of the first seed, and
    -- says what is true of the point; those of other seeds are FAIL, which no sampler and no front looks at.
    ALTER TABLE headsearch.studies ADD COLUMN seeds_apart boolean NOT NULL DEFAULT false;
    ALTER TABLE headsearch.trials
        DROP CONSTRAINT trials_trial_id_key,
        DROP CONSTRAINT trials_requeued_check,
        ADD CONSTRAINT trials_requeued_check CHECK (NOT requeued OR state IN ('failed', 'pruned'));
    CREATE INDEX trials_by_trial_id ON headsearch.trials (trial_id);

    UPDATE headsearch.studies s SET seeds_apart = true
    WHERE json_array_length(spec->'seeds') > 1
    AND EXISTS (SELECT 1 FROM headsearch.trials t WHERE t.study_id = s.study_id);

    CREATE TEMPORARY TABLE merged ON COMMIT DROP AS
    SELECT t.study_id, t.point_key, min(t.trial_id) AS trial_id, array_agg(t.trial_id) AS trial_ids,
           json_array_length(s.spec->'seeds') AS seeds, count(*) AS begun,
           count(*) FILTER (WHERE t.state = 'complete') AS complete,
           count(*) FILTER (WHERE t.state = 'failed') AS failed,
           count(*) FILTER (WHERE t.finished_at IS NULL) AS unfinished,
           s.state IN ('complete', 'cancelled') AS closed
    FROM headsearch.trials t JOIN headsearch.studies s USING (study_id)
    WHERE s.seeds_apart AND NOT t.requeued GROUP BY t.study_id, t.point_key, s.study_id;

    DELETE FROM public.trial_values v USING merged m WHERE v.trial_id = ANY(m.trial_ids);
    INSERT INTO public.trial_values (trial_id, objective, value, value_type)
    SELECT m.trial_id, v.at - 1, avg(v.value::float8), 'FINITE'
    FROM merged m
    JOIN public.trials o ON o.trial_id = m.trial_id
    JOIN headsearch.trials t ON t.study_id = m.study_id AND t.point_key = m.point_key AND NOT t.requeued
    CROSS JOIN jsonb_array_elements_text(t.outcome->'values') WITH ORDINALITY AS v (value, at)
    WHERE m.complete = m.seeds GROUP BY m.trial_id, v.at;

    INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
    SELECT o.trial_id, 'message', to_json('a seed of the point that is trial ' || kept.number)::text
    FROM merged m
    JOIN public.trials kept ON kept.trial_id = m.trial_id
    JOIN public.trials o ON o.trial_id = ANY(m.trial_ids) AND o.trial_id <> m.trial_id
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json;

    UPDATE public.trials o SET
        state = CASE
            WHEN o.trial_id <> m.trial_id THEN 'FAIL'
            WHEN m.unfinished > 0 OR (m.begun < m.seeds AND NOT m.closed) THEN 'RUNNING'
            WHEN m.complete = m.seeds THEN 'COMPLETE'
            WHEN m.failed > 0 OR m.begun < m.seeds THEN 'FAIL'
            ELSE 'PRUNED' END::trialstate
    FROM merged m WHERE o.trial_id = ANY(m.trial_ids);
    UPDATE public.trials o SET datetime_complete =
        CASE WHEN o.state <> 'RUNNING' THEN coalesce(o.datetime_complete, now() AT TIME ZONE 'UTC') END
    FROM merged m WHERE o.trial_id = ANY(m.trial_ids);
    UPDATE headsearch.trials t SET trial_id = m.trial_id FROM merged m
    WHERE t.study_id = m.study_id AND t.point_key = m.point_key AND NOT t.requeued;

    -- Of a trial that runs, TPE takes its notes for parameters, also of those that the trial does not have.
    DELETE FROM public.trial_system_attributes a USING headsearch.trials t
    WHERE a.trial_id = t.trial_id AND starts_with(a.key, 'tpe:');
    """,
)


def migrate(database: Database) -> None:
    """Bring Optuna's tables and ours to this version's. Safe to call from many processes at once.

    Raises:
        AccessError: They are not, and the URL's role may not do it.
        DatabaseError: Not reachable, or made by a newer headsearch.
    """
    with database.begin() as connection:
        version = _version(connection)
        if version == len(MIGRATIONS):
            return
        _refuse_newer(version)
        _refuse_strangers(connection, version)
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_SCHEMA})
        _settle_search_path(connection)
    # Connections made from here on find Optuna's tables in `public`.
    database.engine.dispose()
    with database.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_SCHEMA})
        version = _version(connection)
        if version == len(MIGRATIONS):
            return
        _refuse_newer(version)
        # Optuna makes its tables over a connection of its own, while ours holds the lock.
        try:
            with quietly():
                RDBStorage(database.url, engine_kwargs=database.options).engine.dispose()
        except (DBAPIError, RuntimeError) as error:
            raise DatabaseError(f"Optuna's tables cannot be made: {str(error).splitlines()[0]}") from None
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS headsearch"))
        connection.execute(
            text(
                "CREATE TABLE IF NOT EXISTS headsearch.migrations (version integer PRIMARY KEY, "
                "applied_by text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
            )
        )
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            connection.exec_driver_sql(statements)
            connection.execute(
                text("INSERT INTO headsearch.migrations (version, applied_by) VALUES (:version, :by)"),
                {"version": number, "by": __version__},
            )
        for grants in GRANTS:
            connection.exec_driver_sql(grants)


def _refuse_newer(version: int) -> None:
    if version > len(MIGRATIONS):
        raise DatabaseError(
            f"the database has schema version {version}, headsearch {__version__} knows "
            f"{len(MIGRATIONS)}; upgrade headsearch on this machine"
        )


def _refuse_strangers(connection: Connection, version: int) -> None:
    """Raise AccessError where the role may not change the tables, before it tries."""
    row = connection.execute(
        text(
            """
            SELECT current_user AS name, current_setting('transaction_read_only') = 'off' AND CASE
                WHEN to_regclass('headsearch.migrations') IS NULL THEN
                    has_database_privilege(current_database(), 'CREATE')
                    AND has_schema_privilege('public', 'CREATE')
                ELSE pg_has_role(
                    (SELECT relowner FROM pg_class WHERE oid = to_regclass('headsearch.migrations')), 'USAGE')
                END AS may
            """
        )
    ).one()
    if not row.may:
        there = f"tables of version {version} and not {len(MIGRATIONS)}" if version else "no tables yet"
        raise AccessError(
            f"the database has {there}, and role {row.name} may not make them: its owner must run "
            "headsearch db migrate"
        )


def _settle_search_path(connection: Connection) -> None:
    """Keep a role that is named like our schema from finding our tables before Optuna's.

    PostgreSQL looks into a schema of the role's own name first, and both have a table `studies`. For one
    process at a time: PostgreSQL refuses the second of two that make the same setting.
    """
    if connection.scalar(text("SELECT current_user")) == "headsearch":
        name = connection.scalar(text("SELECT quote_ident(current_database())"))
        connection.exec_driver_sql(f"ALTER ROLE headsearch IN DATABASE {name} SET search_path = public")


def _version(connection: Connection) -> int:
    try:
        if connection.scalar(text("SELECT to_regclass('headsearch.migrations')")) is None:
            return 0
        return int(
            connection.scalar(text("SELECT coalesce(max(version), 0) FROM headsearch.migrations")) or 0
        )
    except ProgrammingError as error:
        if getattr(error.orig, "pgcode", None) != "42501":
            raise
        raise AccessError(
            f"role {connection.engine.url.username} may not read headsearch's tables: their owner must run "
            "headsearch db migrate"
        ) from error
