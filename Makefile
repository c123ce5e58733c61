# Sluice. "make" alone says what there is to make.
#
# The versions of all tools (buf, the generators, golangci-lint, gotestsum,
# benchstat, grpcurl) are pinned in tools/go.mod; Go fetches and builds them.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TOOL := go tool -modfile=tools/go.mod

# Coraza keeps off the disk: texts do not get there, and it starts on a read-only root without /tmp.
TAGS := no_fs_access

# The folder for what tests download: virtual environments and wheels.
export SLUICE_CACHE ?= $(HOME)/.cache/sluice

# make test: flags for go test. The race detector needs a C compiler.
TESTFLAGS ?= -race -shuffle=on -timeout=20m
# make demo: flags of the demo, such as --once.
ARGS ?=
# make bench: which Go benchmarks to run beside the measurement of the gateway,
# how often, and the file that gets the report. benchstat reads the reports;
# COUNT=10 gives it enough to compare.
BENCH     ?= .
COUNT     ?= 1
BENCH_OUT ?= test/bench/results/$(shell date -u +%Y-%m-%d)-$(shell git rev-parse --short HEAD 2>/dev/null || echo uncommitted).md
# make bench-overload: how long each load is measured, and the file that gets the report.
OVERLOAD     ?= 60s
OVERLOAD_OUT ?= test/bench/results/$(shell date -u +%Y-%m-%d)-$(shell git rev-parse --short HEAD 2>/dev/null || echo uncommitted)-overload.md
# make soak: for how long, and the file that gets the report.
SOAK     ?= 10m
SOAK_OUT ?= test/mesh/results/$(shell date -u +%Y-%m-%d)-$(shell git rev-parse --short HEAD 2>/dev/null || echo uncommitted).md
# The same of budgets.
BUDGET_SOAK     ?= 3m
BUDGET_SOAK_OUT ?= test/budget/results/$(notdir $(SOAK_OUT))
# make fuzz: how long each target runs.
FUZZTIME ?= 60s
# make kind-test: 1 turns "cannot run here" into a loud success.
KIND_OPTIONAL ?= 0

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the gateway as bin/sluice (static, no C)
	CGO_ENABLED=0 go build -trimpath -tags=$(TAGS) -o bin/sluice ./gateway/cmd/sluice

.PHONY: demo
demo: build ## Run the demo; ARGS=--once ends it after the script
	bin/sluice demo $(ARGS)

.PHONY: generate
generate: ## Regenerate proto/gen and the embedded descriptors
	$(TOOL) buf generate
	$(TOOL) buf build --path proto/inference --path proto/fmaas --path proto/vllm --path proto/sglang --as-file-descriptor-set \
		--exclude-source-info -o interceptors/dialect/apis.binpb
	$(TOOL) buf generate --template examples/yourproto/buf.gen.yaml
	$(TOOL) buf build --path examples/yourproto/proto/acme --as-file-descriptor-set --exclude-source-info \
		-o examples/yourproto/llm.binpb

GENERATED = find proto/gen interceptors/dialect/apis.binpb examples/yourproto/gen examples/yourproto/llm.binpb \
	-type f | sort | xargs sha256sum

.PHONY: checkgenerate
checkgenerate: ## Fail if generated files differ from what their sources give
	@before=$$($(GENERATED)); \
	$(MAKE) --no-print-directory generate; \
	if ! diff <(echo "$$before") <($(GENERATED)); then \
		echo "generated files were out of date; they are right now: commit them"; exit 1; \
	fi

# The commit that buf breaking compares with: the main branch, as far as it is known here.
MAIN = $(shell git rev-parse -q --verify origin/main || git rev-parse -q --verify main)

.PHONY: lint
lint: ## Lint Go and protobuf; refuse breaking changes of protobuf against main
	$(TOOL) golangci-lint run
	$(TOOL) buf lint
	@if [ -n "$(MAIN)" ] && git cat-file -e "$(MAIN):buf.yaml" 2>/dev/null; then \
		echo "buf breaking --against $(MAIN)"; \
		$(TOOL) buf breaking --against '.git#ref=$(MAIN)'; \
	else \
		echo "buf breaking: skipped, no main branch with protobuf files to compare with"; \
	fi

.PHONY: check
check: ## What a change must pass before review: build, vet, lint, fast tests
	go build ./...
	go vet ./...
	$(MAKE) --no-print-directory checkgenerate lint
	go test -short ./...

.PHONY: test
test: peers mesh ## Run all tests, with the race detector, real model servers and a real SPIRE
	@flags='$(TESTFLAGS)'; \
	if ! command -v "$$(go env CC)" >/dev/null; then \
		echo "!!! no C compiler ($$(go env CC)): tests run WITHOUT the race detector"; \
		flags=$${flags//-race/}; \
	fi; \
	$(TOOL) gotestsum --format=pkgname --format-hide-empty-pkg -- $$flags ./...

# test/peers/setup.sh ends with 77 where it cannot reach what it installs.
.PHONY: peers
peers: # Install the real servers and clients that test/peers drives
	@if [ ! -f test/peers/setup.sh ]; then exit 0; fi; \
	rc=0; bash test/peers/setup.sh || rc=$$?; \
	case $$rc in \
		0) ;; \
		77) echo "!!! SKIPPED: real model servers and clients cannot be installed here" ;; \
		*) exit $$rc ;; \
	esac

# test/mesh/setup.sh ends with 77 where it cannot build one.
.PHONY: mesh
mesh: # Build the SPIRE that test/mesh runs
	@rc=0; bash test/mesh/setup.sh >/dev/null || rc=$$?; \
	case $$rc in \
		0) ;; \
		77) echo "!!! SKIPPED: a real SPIRE cannot be built here" ;; \
		*) exit $$rc ;; \
	esac

.PHONY: soak
soak: mesh soak-budget ## Renew identities of a real SPIRE under load for SOAK (10m), and soak budgets; reports to test/*/results
	SLUICE_SOAK='$(SOAK)' SLUICE_SOAK_OUT='$(abspath $(SOAK_OUT))' \
		go test -count=1 -v -timeout=0 -run='^TestSoak$$' ./test/mesh

.PHONY: soak-budget
soak-budget: ## Kill gateways and fail their store under load for BUDGET_SOAK (3m); report to test/budget/results
	SLUICE_SOAK='$(BUDGET_SOAK)' SLUICE_SOAK_OUT='$(abspath $(BUDGET_SOAK_OUT))' \
		go test -count=1 -v -timeout=0 -run='^TestSoak$$' ./test/budget

.PHONY: bench-peers
bench-peers: ## Install Envoy, nginx and HAProxy, for make bench to measure beside the gateway
	bash test/bench/setup.sh

.PHONY: bench
bench: ## Measure the gateway beside a pass-through, and write a report to test/bench/results; QUICK=1: in 90 s
	go build -o bin/bench ./test/bench
	bin/bench $(if $(QUICK),-quick) -bench='$(BENCH)' -count=$(COUNT) -out='$(BENCH_OUT)'

.PHONY: bench-overload
bench-overload: ## Measure admission at ten times the load beside other proxies, OVERLOAD (60s) for each load; a report to test/bench/results
	go run ./test/bench/overload -for='$(OVERLOAD)' -out='$(OVERLOAD_OUT)'

.PHONY: scorecard
scorecard: ## Measure the inspection on the texts in DATA, by source and as shipped; writes interceptors/inspect/classify/SCORECARD.md
	@{ printf '# Scorecard\n\nWritten by make scorecard; do not edit. First each source is scored by a model that has not seen it, then by one that\n'; \
	printf 'has seen composed texts alone; DATASHEET.md says what the lines mean. Last comes what sluice eval says of the weights\n'; \
	printf 'as they are shipped: they were trained on these attacks and harmless texts, so of that only what is said of personal\n'; \
	printf 'data, secrets and times tells how well it does.\n\n```\n'; \
	go run ./interceptors/inspect/classify/train --data '$(DATA)' --cv && printf '\nas shipped\n' && \
	go run ./gateway/cmd/sluice eval --data '$(DATA)' && printf '```\n'; } > interceptors/inspect/classify/SCORECARD.md

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (60s)
	@go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./... | while read -r pkg; do \
		go test -list='^Fuzz' "$$pkg" | { grep '^Fuzz' || true; } | while read -r target; do \
			echo "== $$pkg $$target"; \
			go test -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(FUZZTIME) "$$pkg" </dev/null; \
		done; \
	done

.PHONY: kind-up
kind-up: ## Make a kind cluster with the gateway and a model server
	bash kind/up.sh

# kind/test.sh ends with 77 where there is no Docker, no kind or no node image.
.PHONY: kind-test
kind-test: ## Test the gateway in a kind cluster
	@rc=0; bash kind/test.sh || rc=$$?; \
	if [ $$rc = 77 ] && [ '$(KIND_OPTIONAL)' = 1 ]; then \
		echo "!!! SKIPPED: kind-test cannot run here (the reason is above)"; exit 0; \
	fi; \
	exit $$rc

.PHONY: kind-down
kind-down: ## Delete the kind cluster
	bash kind/down.sh

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin
	go clean -testcache
