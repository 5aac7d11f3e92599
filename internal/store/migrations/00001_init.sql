-- One text for SQLite and PostgreSQL. Times are microseconds since 1970 in UTC,
-- 0 meaning never, because both databases compare and keep integers exactly.
-- The states have no CHECK: nestbox.Transitions is the one list of them, and
-- every update is guarded by it.

-- +goose Up
CREATE TABLE teams (
    id         TEXT   NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id           TEXT   NOT NULL PRIMARY KEY,
    team_id      TEXT   NOT NULL REFERENCES teams (id),
    name         TEXT   NOT NULL,
    prefix       TEXT   NOT NULL,
    hash         TEXT   NOT NULL UNIQUE,
    created_at   BIGINT NOT NULL,
    last_used_at BIGINT NOT NULL
);
CREATE INDEX api_keys_by_team ON api_keys (team_id, created_at, id);

CREATE TABLE hosts (
    id         TEXT    NOT NULL PRIMARY KEY,
    driver     TEXT    NOT NULL,
    version    TEXT    NOT NULL,
    cpus       INTEGER NOT NULL,
    memory_mb  BIGINT  NOT NULL,
    templates  TEXT    NOT NULL -- JSON array of names
);

CREATE TABLE capsules (
    id             TEXT    NOT NULL PRIMARY KEY,
    team_id        TEXT    NOT NULL REFERENCES teams (id),
    host_id        TEXT    NOT NULL REFERENCES hosts (id),
    template       TEXT    NOT NULL,
    state          TEXT    NOT NULL,
    reason         TEXT    NOT NULL,
    vcpus          INTEGER NOT NULL,
    memory_mb      BIGINT  NOT NULL,
    disk_mb        BIGINT  NOT NULL,
    pids_max       INTEGER NOT NULL,
    timeout_sec    BIGINT  NOT NULL,
    metadata       TEXT    NOT NULL, -- JSON object of strings
    created_at     BIGINT  NOT NULL,
    started_at     BIGINT  NOT NULL,
    last_active_at BIGINT  NOT NULL,
    updated_at     BIGINT  NOT NULL
);
CREATE INDEX capsules_by_team ON capsules (team_id, created_at, id);
CREATE INDEX capsules_by_host ON capsules (host_id, state);
CREATE INDEX capsules_by_age ON capsules (state, updated_at);

-- What an installation makes up once and keeps.
CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

-- +goose Down
DROP TABLE settings;
DROP TABLE capsules;
DROP TABLE hosts;
DROP TABLE api_keys;
DROP TABLE teams;
