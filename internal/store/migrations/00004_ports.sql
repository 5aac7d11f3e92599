-- How the ports of a capsule are reached from outside, as its owner says.

-- +goose Up
ALTER TABLE capsules ADD COLUMN ports TEXT NOT NULL DEFAULT '{}'; -- JSON: nestbox.PortSettings by port

-- +goose Down
ALTER TABLE capsules DROP COLUMN ports;
