-- The image that a capsule was started from.

-- +goose Up
ALTER TABLE capsules ADD COLUMN image TEXT NOT NULL DEFAULT ''; -- '' = its host chose

-- +goose Down
ALTER TABLE capsules DROP COLUMN image;
