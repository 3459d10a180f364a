# One command each; all but help and clean first bring .venv up to date. Works with GNU make 3.81 and later.
.DEFAULT_GOAL := help
.PHONY: help book test lab bench train setup clean

PYTHON ?= python3
PROFILE ?= default
STUDY ?= over-training
SCALE ?= cpu
WORKERS ?= 2
# -P: a file yaml.py in the folder where one stands is not taken for the module
RUN := .venv/bin/python -P

help:  ## show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'

book: setup  ## run what is stale, build book/_build/html/index.html (PROFILE=smoke, default or paper)
	@$(RUN) -m labelaug.cli book --profile $(PROFILE)

test: setup  ## run all tests, on two cores
	@$(RUN) -m pytest -n 2 --dist loadfile

lab: setup  ## open the notebooks in JupyterLab
	@$(RUN) -m jupyterlab notebooks

train: setup  ## train what is missing of a study (STUDY=over-training SCALE=smoke, cpu, gpu or paper WORKERS=2)
	@$(RUN) -m labelaug.cli train $(STUDY) --scale $(SCALE) --workers $(WORKERS)

bench: setup  ## time trainers and minimisers on this machine
	@$(RUN) -m labelaug.cli bench

# The stamp holds a checksum of what was installed, and where, since a moved environment does not work. It is written
# last: without it .venv is made anew, because what an interrupted installation leaves may look whole to pip.
setup:  ## make or update .venv (PYTHON=python3.12 for another interpreter)
	@set -e; \
	stamp="$$(cat requirements.txt pyproject.toml | cksum) $$(pwd)"; \
	if [ "$$(cat .venv/.labelaug 2>/dev/null)" = "$$stamp" ] && $(RUN) -c '' 2>/dev/null; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or later is needed and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing):" \
	    "name another one, as in make PYTHON=python3.12 $(or $(firstword $(MAKECMDGOALS)),setup)." >&2; exit 1; }; \
	if [ -f .venv/.labelaug ] && [ "$$(sed 's/^[0-9]* [0-9]* //' .venv/.labelaug)" = "$$(pwd)" ] \
	    && $(RUN) -c '' 2>/dev/null; then rm .venv/.labelaug; \
	else echo "Making .venv: this installs about 2 GB, once."; $(PYTHON) -m venv --clear .venv; fi; \
	$(RUN) -m pip install --disable-pip-version-check $$([ -t 1 ] || echo --quiet) -r requirements.txt; \
	echo "$$stamp" > .venv/.labelaug

clean:  ## remove what was built, and caches; .venv, downloads and image sets stay
	rm -rf book/_build .pytest_cache .ruff_cache
	find src tests benchmarks book/_ext -name __pycache__ -type d -prune -exec rm -rf {} +
