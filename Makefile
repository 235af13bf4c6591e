# make demo     set up and run the main job          make test     set up and pass the tests
# make up       keep a cluster and the API running    make down     end them                 make models   what is published
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LM_EVAL := .tidepool/lm-eval
export PYTHONPATH := $(CURDIR):$(CURDIR)/platform
export TIDEPOOL_STORE ?= file://$(CURDIR)/.tidepool/demo/store

.PHONY: setup demo test test-s3 test-elastic test-autoscaling test-slow test-unit lint up down models lock clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"Tidepool needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python cannot make environments: install its venv package (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Setting up $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@$(BIN)/python demo/demo.py

test: setup
	@$(BIN)/python -m pytest -m "not long"

# What `make test` has no time for: training scripts as people write them, each killed three times, and one as a job; damaged imports;
# a cluster that asks for a token, and one for certificates; planted keys; a cluster of two nodes; 10,000 requests that schemathesis makes
# up; lm-evaluation-harness; replicas of an engine that are killed, must go, and are scaled; the pool that serving takes a slot from; the
# slowest of what else needs a cluster.
test-slow: setup $(LM_EVAL)/.complete
	@$(BIN)/python -m pytest -m long

$(LM_EVAL)/.complete: tests/serving/lm_eval_environment.sh requirements.lock | setup
	@sh tests/serving/lm_eval_environment.sh $(LM_EVAL) $(BIN)/python

# The same tests on a real Ceph RGW, which is installed from Debian's packages and started for them (root only).
test-s3: setup
	@$(BIN)/python -m pytest --s3 ceph tests/stores tests/storage tests/checkpoint tests/registry tests/training/test_killed_run.py

# Replica groups that die, hang, come and go, drivers and heads that die, nodes that are slow: real signals on Ray clusters of the session's own.
# ELASTIC='-k "killed or paused"': some.
test-elastic: setup
	@$(BIN)/python -m pytest --elastic -m elastic tests/training tests/pool $(ELASTIC)

# Nodes that come and go: Ray's autoscaler on a cluster of this machine, real runs and real traffic.
test-autoscaling: setup
	@$(BIN)/python -m pytest --autoscaling tests/pool/test_autoscaling_cluster.py

test-unit: setup
	@$(BIN)/python -m pytest -m "not cluster and not slow"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

up: setup
	@$(BIN)/python -m tidepool.cli up

down: setup
	@$(BIN)/python -m tidepool.cli down

models: setup
	@$(BIN)/python -m tidepool.cli models list

# After a change of the dependencies: install what pyproject.toml asks for and does not have yet, then write down what is there.
lock: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@{ head -n 1 requirements.lock; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//'; } > requirements.new
	@mv requirements.new requirements.lock

clean:
	@rm -rf $(VENV) .tidepool build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
