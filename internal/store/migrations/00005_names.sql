-- What a capsule is called, and the names of what is in its environment, whose values
-- its host alone keeps. A name is one live capsule's of a team.

-- +goose Up
ALTER TABLE capsules ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE capsules ADD COLUMN hostname TEXT NOT NULL DEFAULT '';
ALTER TABLE capsules ADD COLUMN env_names TEXT NOT NULL DEFAULT '[]'; -- JSON
CREATE UNIQUE INDEX capsules_by_live_name ON capsules (team_id, name)
    WHERE name <> '' AND state IN ('starting', 'running', 'missing');
CREATE INDEX capsules_by_name ON capsules (team_id, name, created_at) WHERE name <> '';

-- +goose Down
DROP INDEX capsules_by_name;
DROP INDEX capsules_by_live_name;
ALTER TABLE capsules DROP COLUMN env_names;
ALTER TABLE capsules DROP COLUMN hostname;
ALTER TABLE capsules DROP COLUMN name;
