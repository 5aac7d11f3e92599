-- Which request made a capsule, so that the same one again makes no other.

-- +goose Up
ALTER TABLE capsules ADD COLUMN request_key TEXT NOT NULL DEFAULT '';
ALTER TABLE capsules ADD COLUMN request_sum TEXT NOT NULL DEFAULT ''; -- of what was asked
CREATE UNIQUE INDEX capsules_by_request ON capsules (team_id, request_key) WHERE request_key <> '';

-- +goose Down
DROP INDEX capsules_by_request;
ALTER TABLE capsules DROP COLUMN request_sum;
ALTER TABLE capsules DROP COLUMN request_key;
