# Jetbridge. `make help` lists the targets.

GO      ?= go
DESTDIR ?=
LAB     ?= lab
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.0.0-unknown)

# Podman's bindings without their C parts, for static binaries.
TAGS     := remote containers_image_openpgp exclude_graphdriver_btrfs exclude_graphdriver_devicemapper
GO_BUILD := CGO_ENABLED=0 $(GO) build -trimpath -tags "$(TAGS)" -ldflags "-s -w -X main.version=$(VERSION)"
GO_LINT  := $(GO) tool -modfile=test/tools/go.mod golangci-lint

.DEFAULT_GOAL := help
.PHONY: help build bin/jetbridge-shim bin/jetbridge-agent bin/lab install-agent \
	check lint vet unit test e2e bench demo lab lab-down deps root generate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: bin/jetbridge-shim bin/jetbridge-agent ## build the shim and the agent into bin/

bin/jetbridge-shim:
	$(GO_BUILD) -o $@ ./cluster-shim

bin/jetbridge-agent:
	$(GO_BUILD) -o $@ ./device-agent

bin/lab:
	$(GO_BUILD) -o $@ ./test/lab

install-agent: bin/jetbridge-agent ## install the agent and its units below DESTDIR
	packaging/install-agent "$(DESTDIR)" bin/jetbridge-agent

check: lint vet ## the fast part of the tests, without root or lab
	$(MAKE) unit

lint: ## golangci-lint, pinned in test/tools
	$(GO_LINT) run

vet: ## go vet
	$(GO) vet -tags "$(TAGS) e2e" ./...

unit: ## unit and component tests with the race detector
	CGO_ENABLED=1 $(GO) test -race -tags "$(TAGS)" ./...

test: root deps ## everything: lint, vet, unit tests, e2e tests on a lab of its own
	$(MAKE) check
	$(MAKE) e2e

e2e: root deps bin/lab ## only the e2e tests, on a lab of its own
	test/e2e/run

bench: ## benchmarks
	CGO_ENABLED=0 $(GO) test -tags "$(TAGS)" -run '^$$' -bench . ./...

demo: root deps bin/lab ## install, bring the lab up, and show the main job on two devices
	$(GO) run ./test/demo

lab: root deps bin/lab ## build bin/lab and bring the lab up (LAB=name)
	bin/lab up --name "$(LAB)"

lab-down: root bin/lab ## end the lab, and prove that nothing is left (LAB=name)
	bin/lab down --name "$(LAB)"

generate: ## rewrite what is generated: reference pages, golden files
	$(GO) test -tags "$(TAGS)" $$(grep -rl 'flag.Bool("update"' --include='*_test.go' . | xargs -n 1 dirname | sort -u) -update

clean: ## remove what was built here; caches outside the checkout stay
	rm -rf bin dist

deps: ## install what the tests and the lab need from the distribution
	@test/deps

root:
	@[ "$$(id -u)" = 0 ] || { echo "This target runs a lab of network namespaces and cgroups and needs root; 'make check' is the part of the tests that does not."; exit 1; }
