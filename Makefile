# Needs Python >= 3.10 and make; everything else goes into .venv.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: venv demo test test-mine lint bench clean

venv: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -e ".[plots,dev]"
	touch $@

demo: venv  ## pre-train on digits, print the table, draw the picture
	$(RUN) demo.py

test: venv  ## the test suite, on all cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

SCRIPT ?= mine
test-mine: venv  ## what every page passes, for a copy of one: make test-mine SCRIPT=mine FLAGS="--queue 40"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile --script $(SCRIPT) $(if $(FLAGS),--flags "$(FLAGS)")

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv  ## side-by-side timings; installs the libraries that are compared with
	$(RUN) -m pip install --quiet -e ".[bench]"
	$(RUN) benchmarks/run.py

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
