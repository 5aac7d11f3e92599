-- What a capsule may reach outside. Capsules from before this reach nothing.

-- +goose Up
ALTER TABLE capsules ADD COLUMN network TEXT NOT NULL DEFAULT 'null'; -- JSON: nestbox.NetworkPolicy

-- +goose Down
ALTER TABLE capsules DROP COLUMN network;
