package api

import (
	"net/http"
	"testing"
)

func TestForwardIsRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const path = "/v1/capsules/{id}/ports/80/forward"
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	r.request(http.MethodGet, path, nil).fails(http.StatusUpgradeRequired, "invalid_request")
	r.request(http.MethodGet, path, nil, append(upgrade, apiKeyHeader, r.other)...).fails(http.StatusNotFound, "not_found")
	r.request(http.MethodGet, path, nil, append(upgrade, apiKeyHeader, "wrn_none")...).fails(http.StatusUnauthorized, "unauthorized")
	r.request(http.MethodGet, "/v1/capsules/{id}/ports/080/forward", nil, upgrade...).fails(http.StatusBadRequest, "invalid_request")
}
