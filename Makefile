PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait asleep: with the default, spinning, two busy processes slow each other a lot.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check bench lab docs

# The main job: notebooks 01 to 07 on the bundled photographs: about seven minutes on two quick cores,
# up to twice that on slower ones.
demo: $(STAMP)
	$(BIN)/vitgal run params/demo.yaml

# Every test: ruff, the params check, the unit tests, the notebooks under nbval.
test: $(STAMP)
	$(BIN)/python -m tests.run all

# About two minutes: ruff, the params check and the unit tests.
check: $(STAMP)
	$(BIN)/python -m tests.run check

# The site, in build/site: chapters, how-tos and reference; with the page of the demo run, if there is one.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W -c docs -b html . build/site

# Speeds beside the published way; what is printed goes into benchmarks/README.md.
bench: $(STAMP)
	$(BIN)/python benchmarks/record.py --all

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=.

# .venv is built anew whenever it is missing or older than what it is built from.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[baselines,dev,heic,scale]"
	touch $(STAMP)
