# One word for each job; `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train sweep evaluate release serve map recipes monitor alerts load chaos bench profile test prep export lint docs results lab clean

help: ## List the jobs
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make .venv with the versions of constraints.txt; does nothing when it is there

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make setup: Python 3.11 or newer is needed, $(PYTHON) is not it; try: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make setup: $(PYTHON) has no venv; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): some 300 packages, 7 GB on Linux, a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then git config merge.jupyternotebook.driver "$(BIN)/nbdev-merge %O %A %B %P"; fi
	@touch $@

train: setup ## Train on EuroSAT (synthetic tiles where it cannot be had), then evaluate; ARGS="--lr 1e-3" changes a parameter
	$(BIN)/eurosat train $(ARGS)
	$(BIN)/eurosat evaluate

sweep: setup ## Search for better parameters; the same again goes on; ARGS="--trials 40 --workers 2 -p epochs=4"
	$(BIN)/eurosat sweep $(ARGS)

recipes: setup ## Train quick and best by five seeds on both splits, and the recipe without each of its parts; hours
	$(BIN)/papermill nbs/recipes.ipynb runs/recipes.ipynb $(ARGS)
	$(BIN)/papermill nbs/recipes.ipynb runs/ablation.ipynb -p what ablation $(ARGS)
	cp runs/recipes/seeds.json nbs/results/recipes.json
	cp runs/recipes/ablation.json nbs/results/

evaluate: setup ## Evaluate the latest run on its test part; ARGS="--run NAME" for another
	$(BIN)/eurosat evaluate $(ARGS)

release: setup ## Make a release candidate of the latest run: int8, parity, latency, the gate; ARGS="--run NAME" for another
	$(BIN)/eurosat release $(ARGS)

serve: setup ## Serve the model in production, or ARGS="--model runs/latest", on http://127.0.0.1:8000
	$(BIN)/eurosat serve $(ARGS)

map: setup ## Map a satellite scene by the model in production; ARGS="scene.tif --out map --stride 32"
	$(BIN)/eurosat map $(ARGS)

alerts: setup ## Write the dashboard and Google Cloud's policies from deploy/monitoring/rules.yml
	$(BIN)/python -c 'from pathlib import Path; from eurosat_mlops.alerts import write_monitoring; write_monitoring(Path("deploy/monitoring"))'

monitor: setup ## Watch what the model in production answers: findings and a report; ARGS="--since 30d --repeat 1h"
	$(BIN)/eurosat monitor $(ARGS)

load: setup ## Let many clients ask the service, by locust; ARGS="--users 64", or ARGS="http://host:8000" for one that runs
	$(BIN)/eurosat load $(ARGS)

bench: setup ## Measure the service beside a plain one, and training beside fastai, Lightning and a plain loop; ARGS="--no-training"
	$(BIN)/eurosat bench $(ARGS)

test: setup ## Run every notebook, then the tests, which must cover 90 % of the package
	$(BIN)/pytest -q --nbval-lax --nbval-cell-timeout=300 nbs
	$(BIN)/pytest --cov --cov-fail-under=90 tests

prep: export test ## Before a commit: export, then test

export: setup ## Format the notebooks, write modules and README.md from them, clean them
	$(BIN)/ruff format --quiet nbs tests .ci
	$(BIN)/nbdev-export
	$(BIN)/ruff format --quiet eurosat_mlops
	$(BIN)/nbdev-clean
	$(BIN)/python .ci/preview.py readme

lint: setup ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: setup ## Preview the site in _docs/ and check its links (the published one is built by Quarto on GitHub)
	$(BIN)/python .ci/preview.py site

profile: setup ## Train once with the simple profiler and show where the time went
	$(BIN)/eurosat train --name profile --profile simple $(ARGS)

chaos: setup ## Do harm to the service and hold it to its promises, some 15 minutes; ARGS="--quick --model runs/latest"
	$(BIN)/eurosat chaos $(ARGS)

results: setup ## Train, evaluate and release both splits of EuroSAT, measure the service, do it harm: all that the README shows
	set -e; for split in random spatial; do \
		$(BIN)/eurosat train --data eurosat --split $$split --name $$split $(ARGS); \
		$(BIN)/eurosat evaluate; \
		$(BIN)/eurosat release; \
		mkdir -p nbs/results && cp runs/latest/metrics.json nbs/results/$$split.json; \
	done
	set -e; model=$$(ls -d runs/*-random | tail -n 1); \
		$(BIN)/eurosat bench --model $$model --soak-minutes 30; \
		cp $$(ls -d runs/*Z-benchmark | tail -n 1)/benchmark.json nbs/results/; \
		cp $$(ls -d runs/*-training-benchmark | tail -n 1)/training_benchmark.json nbs/results/; \
		$(BIN)/eurosat chaos --model $$model || true; \
		cp $$(ls -d runs/*-chaos | tail -n 1)/chaos.json nbs/results/
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --inplace --execute nbs/index.ipynb
	$(MAKE) export

lab: setup ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs $(ARGS)

clean: ## Remove what is made again by itself; never data/, runs/ or models/
	rm -rf _docs _proc build dist .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
	find nbs tests eurosat_mlops -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
