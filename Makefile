# Nestbox: `make` lists what there is to make. Needs Go 1.26; demo, up, test
# and bench need root on a Debian-like Linux.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# No cgo, so that the binaries are static, and the same flags everywhere, so
# that gVisor is compiled once and cached.
export CGO_ENABLED := 0
export GOFLAGS := -modfile=$(CURDIR)/bin/gvisor/go.mod
GOBUILD := go build -trimpath -ldflags '-s -w'

STATE  ?= $(CURDIR)/.nestbox
LISTEN ?= 127.0.0.1:8080

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: go-version
go-version:
	@command -v go >/dev/null || { echo "Go 1.26 or newer is needed: https://go.dev/dl/" >&2; exit 1; }
	@GOFLAGS= scripts/patch-gvisor $(CURDIR)/bin/gvisor

.PHONY: build
build: go-version ## build bin/nestbox, which has gVisor and envd in it
	@scripts/progress "building envd" $(GOBUILD) -v -o bin/envd ./cmd/envd
	@cmp -s bin/envd internal/envdbin/envd.bin || cp bin/envd internal/envdbin/envd.bin
	@scripts/progress "building nestbox (the first time with all of gVisor: one to three minutes)" \
	  $(GOBUILD) -v -tags embed_envd -o bin/nestbox ./cmd/nestbox

.PHONY: demo
demo: deps build ## build all, walk through the main job on this machine, clean up
	@bin/nestbox demo

.PHONY: up
up: deps build ## build all, start the server in the background, say how to use it
	@bin/nestbox up --detach --dir $(STATE) --listen $(LISTEN)

.PHONY: down
down: ## stop the server of `make up`; its capsules go on
	@bin/nestbox down --dir $(STATE)

.PHONY: test
test: go-version test-deps vet ## run the whole test suite, installing what it needs
	@scripts/test

.PHONY: test-vm
test-vm: go-version ## test in a virtual machine: control groups v2, systemd, power cuts
	@scripts/test-vm $(SCENARIOS)

.PHONY: deps
deps:
	@scripts/install-deps

.PHONY: test-deps
test-deps:
	@scripts/install-deps test

.PHONY: vet
vet:
	@echo "== gofmt, go vet"
	@test -z "$$(gofmt -l $$(git ls-files '*.go' | grep -v '^gen/'))" || { gofmt -l $$(git ls-files '*.go' | grep -v '^gen/'); echo "these files are not gofmt-ed" >&2; exit 1; }
	@scripts/progress "compiling everything (the first time with all of gVisor: one to three minutes)" go build -trimpath -v ./...
	@go vet -trimpath ./...

.PHONY: check
check: go-version vet ## quick: format, vet, and the tests that need neither root nor gVisor
	@go test -trimpath . ./client/... ./internal/api/... ./internal/archtest/... ./internal/config/... ./internal/edge/...

.PHONY: bench
bench: build ## measure side by side with runsc, fork+exec and plain pipes
	@$(GOBUILD) -o bin/probe ./bench/probe
	@$(GOBUILD) -o bin/bench ./bench
	@bin/bench

.PHONY: fuzz
fuzz: go-version ## run every fuzz target for a short while
	@scripts/fuzz

.PHONY: generate
generate: go-version ## regenerate code and documents from their sources
	@echo "== protobuf (the first time buf is compiled: two minutes)"
	@go tool -modfile=tools/buf.mod buf lint
	@go tool -modfile=tools/buf.mod buf generate
	@echo "== docs/states.md, internal/api/openapi.yaml"
	@go generate ./internal/...

.PHONY: verify
verify: generate vet ## check that what is generated is what is committed
	@git diff --exit-code -- gen docs/states.md internal/api/openapi.yaml || { echo "generated files are stale: run make generate and commit" >&2; exit 1; }
	@go test -trimpath ./internal/archtest/...

.PHONY: clean
clean: ## remove what was built
	rm -rf bin internal/envdbin/envd.bin
