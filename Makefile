# Needs Python 3.11+ and make; every target installs the rest into .venv the first time, and again only when
# pyproject.toml has changed. Another Python: make PYTHON=/usr/bin/python3.12 demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What another project put there must not be imported instead of what we install.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults starter lint format audit clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

# `exec`, so that a signal for make reaches the program and not a shell in between.
demo: $(INSTALLED) ## train 45 heads on built-in displays, adapt them to others, on a local Ray head; results in runs/
	exec $(BIN)/python jobs/local_cluster.py -- python jobs/pipeline.py displays --root "$(CURDIR)/runs"

test: lint ## lint, types and the tests, in two processes, a file in one of them
	exec $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: $(INSTALLED) ## the slow tests that kill processes in mid-training
	exec $(BIN)/python -m pytest -m faults

# The photographs of OSIE and SUN500 are not part of this repository.
PHOTOGRAPHS := --dataset ../shared/gaze --pixels-per-degree 30
starter: $(INSTALLED) ## the package's starter model, trained on ../shared/gaze; 20 minutes
	$(BIN)/acw run gaze $(PHOTOGRAPHS) --root runs/starter | tee runs/starter.log
	exec $(BIN)/python jobs/starter.py "$$(sed -n 's/^run: //p' runs/starter.log)" $(PHOTOGRAPHS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a package that the registry's list of vulnerabilities does not know fails it, too, lest silence look like peace.
audit: $(INSTALLED) ## known vulnerabilities of the installed packages, by pip-audit
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+[^ ;]*//' > $(VENV)/audit.txt
	exec $(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner=off -r $(VENV)/audit.txt

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "acw needs Python 3.11 or newer, and '$(PYTHON)' is not that." \
			"Name one that is: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[lite,cluster,serve,dev]'
	@touch $@
