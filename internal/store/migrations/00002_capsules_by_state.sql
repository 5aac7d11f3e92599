-- A page of a team's capsules is read by its states: however many capsules have
-- ended, those that run are found without looking at them.

-- +goose Up
CREATE INDEX capsules_by_team_and_state ON capsules (team_id, state, created_at, id);
DROP INDEX capsules_by_team;

-- +goose Down
CREATE INDEX capsules_by_team ON capsules (team_id, created_at, id);
DROP INDEX capsules_by_team_and_state;
