# Every target makes what it needs in .venv on first use. `make` alone lists the targets.
BIN     := .venv/bin
WORKERS ?= 2
RUN     ?=
NOTE    ?=
OUT     ?= runs/demo
# The first of these that is Python 3.11 or newer; `make PY=/path/to/python TARGET` chooses another.
NEW_ENOUGH = import sys; sys.version_info >= (3, 11) and print(sys.argv[1])
PY ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c '$(NEW_ENOUGH)' $(p) 2>/dev/null)))

.PHONY: help demo lab explore test bench docs prepare outputs judge ship reader study faces clean
.NOTPARALLEL:

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: .venv/with-base  ## move expressions between bundled faces; pictures and a report in runs/demo
	$(BIN)/twocet demo --out $(OUT)

lab: .venv/with-dev  ## open the notebooks in JupyterLab (they are cleaned on every save)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --config=tools/lab_config.py $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

explore: .venv/with-app  ## open the explorer in a browser, served to this computer alone
	$(BIN)/twocet explore

# One thread a process: two processes on two cores are many times slower when each starts a thread per core.
test: export OMP_NUM_THREADS = 1
test: .venv/with-dev  ## every check: notebooks and package in step, README in step, all tests
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/readme.py --check
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=15 tests

bench: .venv/with-base  ## how much faster, here, each trick makes a training step (on a GPU the paper preset too) and ours is a Frechet distance; how soon a slider's picture is in the page
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/frechet.py
	$(BIN)/python benchmarks/explorer.py

docs: .venv/with-docs  ## the book as a web site, in build/site
	$(BIN)/python tools/docs.py

prepare: .venv/with-dev  ## after editing notebooks: export, clean, README, then all tests
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py
	$(MAKE) test

outputs: .venv/with-dev  ## run all notebooks and save them with their outputs
	$(BIN)/python tools/outputs.py $(NAMES)
	$(BIN)/python tools/readme.py

judge: .venv/with-base  ## numbers of a run, a file or shipped weights on unseen people: make judge RUN=runs/NAME
	$(BIN)/python -c "from twocet_nb.transfer import *; print_judgement(judge(TwoCET.load('$(or $(RUN),faces-64)'), 'faces-64'))"

ship: .venv/with-base  ## put the weights of a run into data/: make ship RUN=runs/NAME
	@test -n "$(RUN)" || { echo 'Say which run: make ship RUN=runs/NAME'; exit 2; }
	$(BIN)/python tools/ship.py $(RUN) --note '$(NOTE)'

reader: .venv/with-base  ## train the small face reader that measures offline, 20 minutes on one core, into data/
	$(BIN)/python tools/reader.py

study: .venv/with-base  ## try all hypotheses of the recipe anew, two hours on one core: nbs/studies/recipe.json
	rm -f nbs/studies/recipe.json
	$(BIN)/python tools/study.py

faces: .venv/with-faces  ## render the bundled faces anew, hours on two cores; stopped, it goes on: runs/faces, then data/
	$(BIN)/twocet faces make --identities 230 --protocol cfee --test 8 --workers $(WORKERS) runs/faces/cfee
	$(BIN)/twocet faces make --identities 230 --protocol cfee --test 8 --still --mimics 600 --workers $(WORKERS) runs/faces/still
	$(BIN)/twocet faces make --identities 12 --protocol rafd --test 2 --seed 1 --workers $(WORKERS) runs/faces/rafd
	$(BIN)/python tools/pack.py runs/faces

clean:  ## remove .venv and everything built; runs/ stays
	rm -rf .venv build dist _proc *.egg-info .pytest_cache

# .venv/with-dev is the stamp of `pip install -e .[dev]`, with-docs of [docs], with-app of [app], with-faces of [faces], with-base of the package alone.
# Repeating an interrupted set-up repairs it. uv is used where it is installed: it is many times faster.
.venv/with-%: settings.ini setup.py
	@test -n "$(PY)" || { echo 'twocet_nb needs Python 3.11 or newer: install one, or name it: make PY=/path/to/python3.11 ...'; exit 2; }
	@echo 'Setting up .venv for "$*" (the first time this fetches PyTorch: some minutes) ...'
	@if command -v uv >/dev/null; then \
		uv venv -q --allow-existing --python $(PY) .venv && \
		uv pip install -q --python $(BIN)/python -e '.$(if $(filter base,$*),,[$*])'; \
	else \
		$(PY) -m venv .venv && \
		$(BIN)/python -m pip install -q --disable-pip-version-check -e '.$(if $(filter base,$*),,[$*])'; \
	fi
	@touch $@
