# Commands of the project. `make repro` and `make test` need Python 3.11 or later, git and make, nothing else.
PYTHON ?= python3
ENV := .venv/bin
export PATH := $(CURDIR)/$(ENV):$(PATH)
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := true
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup lock audit repro test test-fast test-all slowest check bench faults images up down mlflow prefect report

setup: .venv/installed

# System tests take longest, so they start first.
PYTEST := python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/system tests/unit

# Versions and SHA-256 hashes are locked in requirements/. A CPU build of torch is preferred if pip finds one.
INSTALL := $(ENV)/python -m pip install --quiet --no-deps --no-build-isolation

.venv/installed: pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv
	$(INSTALL) --require-hashes --requirement requirements/build.txt
	$(INSTALL) --require-hashes --requirement requirements/torch-cpu.txt 2>/dev/null \
		|| $(INSTALL) --require-hashes --requirement requirements/torch.txt
	$(INSTALL) --require-hashes --requirement requirements/runtime.txt
	$(INSTALL) --require-hashes --requirement requirements/dev.txt
	$(INSTALL) --editable .
	$(ENV)/python -m pip check
	touch $@

# Run after a change of the dependencies in pyproject.toml. UPGRADE=1 takes the newest versions that it allows.
lock: setup
	python -m tools.lock $(if $(UPGRADE),--upgrade)

# Scan the code, check the licences of all dependencies, and query known vulnerabilities of their versions.
audit: setup
	bandit --quiet --recursive --configfile pyproject.toml dpo tasks flows tools
	python -m tools.licences
	@pip-audit --strict --progress-spinner off --require-hashes --disable-pip \
		$(patsubst %,--requirement %,$(filter-out %/torch-cpu.txt,$(wildcard requirements/*.txt))) \
		|| (echo "audit: FAILED. If no vulnerabilities are listed above, the vulnerability service was unreachable."; exit 1)

# `make repro SET="-S dpo.epochs=2"` runs with other settings.
repro: setup
	$(if $(SET),dvc exp run $(SET),dvc repro)
	@dpo results

# Unit tests and one system test per kind of behaviour.
test: setup
	$(PYTEST) -m "not slow"

# Unit tests only.
test-fast: setup
	$(subst tests/system ,,$(PYTEST)) -m "not slow"

# All tests, and all examples of the property tests; about half an hour on two cores.
test-all: setup
	ALL_EXAMPLES=1 $(PYTEST)

# The 20 slowest tests of `make test`.
slowest: setup
	$(PYTEST) -m "not slow" --durations 20

check: setup
	ruff check .
	ruff format --check .
	mypy

# Compare the engine with TRL, profile it, and time validation of up to a million pairs. Needs an idle machine; takes half
# an hour. Writes benchmarks/results and the tables of docs/internals/benchmarks.md and docs/guides/data.md.
bench: setup
	python -m benchmarks.engine
	python -m benchmarks.profile
	python -m benchmarks.validate

# Inject faults into a tiny project: kills, full disks, unreachable servers, kills of nightly runs and rollbacks. Takes an hour;
# `python -m tests.support.nightly` runs the last two only. Interrupted nightly cases continue. Full and read-only disks need root on
# Linux. Writes benchmarks/results/faults.json and the table of docs/operations/faults.md.
faults: setup
	python -m tests.support.faults

# Draw the images of the README. Needs graphviz and Chromium.
images: setup
	python -m tools.images

# Start Prefect, MLflow and a worker in the background and register the deployments of prefect.yaml. Logs are in .servers/.
# Other ports: make up PREFECT_PORT=4300 MLFLOW_PORT=5100
up: setup
	python -m flows.servers up

down: setup
	python -m flows.servers down

mlflow: setup
	$(if $(filter http%,$(MLFLOW_TRACKING_URI)),@echo "MLFLOW_TRACKING_URI is the address of MLflow's UI",\
		MLFLOW_BACKEND_STORE_URI=$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} mlflow ui --host 127.0.0.1 --port 5000)

prefect: setup
	prefect server start --host 127.0.0.1 --port 4200

report:
	@$(PYTHON) -m webbrowser file://$(CURDIR)/reports/index.html
