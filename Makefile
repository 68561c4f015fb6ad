# primia_lite: `make run` and `make test` need git, make and Python 3.11 or newer; the rest comes from the package index.
#
#   make run                               every notebook on the embedded phantom films
#   make run PROFILE=paper DATA=kermany    the paper's experiments on real films (PRIMIA_LITE_DATA: where they lie)
#   make run ONLY=00,02 OUT=somewhere      some notebooks, written elsewhere
#   make test                              the tests, then every notebook checked against its committed outputs
#   make test-browser                      the notebooks' widgets in a real JupyterLab and chromium
#   make test-flower                       Flower as the transport, in an environment of its own (make flower)
#   make docs                              the site, into build/site/html (what it needs: an environment of its own)
#   make lab                               JupyterLab, opened at the first notebook
#   make refresh                           runs the notebooks and keeps their outputs, to commit
#   make setup | doctor | lint | format | clean
#
# PYTHON=python3.12         which Python makes .venv
# TORCH_INDEX=<address>     an index to take torch from, such as the CPU index that pytorch.org/get-started shows

PROFILE ?= smoke
DATA ?=
ONLY ?=
OUT ?=
PYTHON ?=
CHROMIUM ?=
TORCH_INDEX ?=
TESTS ?= tests
# Where test-notebooks writes. CI names a folder in memory: a ledger waits for the disk at each charge.
PRIMIA_LITE_SCRATCH ?= $(CURDIR)/runs
TEST_RUNS = $(PRIMIA_LITE_SCRATCH)/test

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip
# What .venv was made from, and where: scripts in a .venv name its folder, so a moved checkout is set up afresh.
KEY := $(shell (cat requirements.lock pyproject.toml; pwd) | cksum)

# Flower asks for older versions of some packages: its environment lies over .venv and holds only what differs.
FLOWER_BIN := .venv-flower/$(notdir $(BIN))
# So has the site, which few build.
DOCS_BIN := .venv-docs/$(notdir $(BIN))
SITE := build/site/html
over_key = $(shell (cat requirements-$(1).lock requirements.lock pyproject.toml; pwd) | cksum)
# $(call over,NAME): .venv-NAME is there and up to date
over = [ "$$(cat .venv-$(1)/.stamp 2>/dev/null)" = "$(call over_key,$(1))" ] && .venv-$(1)/$(notdir $(BIN))/python -c "" 2>/dev/null \
	|| $(MAKE) --no-print-directory install-$(1)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := no
export CHROMIUM
# Containers often forbid Python to keep what it compiled; each kernel and server would then compile torch and all the
# rest anew, for 15 s.
export PYTHONDONTWRITEBYTECODE :=
# Two kernels side by side on two cores: one thread each. Notebooks run in their own folder, so that the folder of films
# must be absolute.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND= PRIMIA_LITE_HEADLESS=1 \
	PRIMIA_LITE_DATA="$${PRIMIA_LITE_DATA:+$$(cd "$$PRIMIA_LITE_DATA" 2>/dev/null && pwd || echo "$$PRIMIA_LITE_DATA")}"

.PHONY: run test test-unit test-notebooks test-browser test-flower flower docs docs-setup chromium refresh lab doctor setup install install-flower install-docs lint format clean help

run: setup
	@$(BIN)/primia-lite run --profile $(PROFILE) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out "$(OUT)")

test: setup
	@status=0; \
	$(MAKE) --no-print-directory test-unit || status=1; \
	$(MAKE) --no-print-directory test-notebooks || status=1; \
	exit $$status

# nbval takes 4 s to import, in each process.
test-unit: setup
	@$(TEST_ENV) $(BIN)/python -m pytest -p no:nbval -n 2 --dist loadfile $(TESTS)

# nbval compares the outputs of cells tagged nbval-check-output and fails on any error. What notebooks make here goes to
# runs/test, where no user's run finds it.
test-notebooks: setup
	@rm -rf "$(TEST_RUNS)" && PRIMIA_LITE_RUNS="$(TEST_RUNS)" PRIMIA_LITE_FIGURES="$(TEST_RUNS)/figures" \
	PRIMIA_LITE_RESULTS="$(TEST_RUNS)/results" $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile \
	--nbval-lax --nbval-cell-timeout 1800 --nbval-kernel-startup-timeout 600 -p no:cacheprovider notebooks

test-browser: setup chromium
	@$(TEST_ENV) $(BIN)/python -m pytest -p no:nbval -m browser -n 2 --dist worksteal $(if $(filter tests,$(TESTS)),tests/browser,$(TESTS))

test-flower: flower
	@$(TEST_ENV) $(FLOWER_BIN)/python -m pytest -p no:nbval -m flower -n 2 --dist loadfile $(if $(filter tests,$(TESTS)),tests/apps/flower/test_tls.py tests/apps/flower tests/test_lock.py,$(TESTS))

flower: setup
	@$(call over,flower)

docs-setup: setup
	@$(call over,docs)

# Notebooks are shown as committed; nothing is run.
docs: docs-setup
	@$(DOCS_BIN)/python -m sphinx -W --keep-going -q -j 2 -b html -c docs -d build/site/doctrees . $(SITE) && echo "The site is in $(SITE)"

# The .pth file is read after the others, so that what lies in this environment comes first.
install-flower install-docs: install-%:
	@echo "Setting up .venv-$*, over $(VENV)"
	@$(BIN)/python -m venv --clear .venv-$*
	@.venv-$*/$(notdir $(BIN))/python -m pip install --quiet --no-deps --only-binary :all: -r requirements-$*.lock
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(.venv-$*/$(notdir $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_below.pth"
	@.venv-$*/$(notdir $(BIN))/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@echo "$(call over_key,$*)" > .venv-$*/.stamp

# Playwright drives the system's browser; it downloads none of its own.
chromium:
	@for name in $(if $(CHROMIUM),"$(CHROMIUM)",chromium chromium-browser google-chrome google-chrome-stable); do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	if [ -z "$(CHROMIUM)" ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "Installing chromium"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	else \
	  echo "make: no chromium found$(if $(CHROMIUM), at CHROMIUM=$(CHROMIUM)). Install it (Debian: sudo apt install chromium)," >&2; \
	  echo "or name a chromium or Chrome: make test-browser CHROMIUM=/path/to/chrome" >&2; \
	  exit 1; \
	fi

# Run the smoke profile and commit what it shows: outputs kept, whatever changes from run to run dropped. One at a time,
# as outputs show times.
refresh: setup
	@$(BIN)/primia-lite run --jobs 1 $(if $(ONLY),--only $(ONLY)) --out runs/refresh --fresh && \
	for name in $$(sed -n 's/.*"notebook": "\(.*\)",/\1/p' runs/refresh/summary.json); do \
	  cp runs/refresh/$$name.ipynb notebooks/ && \
	  $(BIN)/nbstripout --keep-output --keep-count --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/$$name.ipynb; \
	done

lab: setup
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

doctor: setup
	@$(BIN)/primia-lite doctor

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

setup:
	@[ "$$(cat $(VENV)/.stamp 2>/dev/null)" = "$(KEY)" ] && $(BIN)/python -c "" 2>/dev/null \
	|| $(MAKE) --no-print-directory install

install:
	@python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; \
	  then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer with venv and ensurepip found$(if $(PYTHON), at PYTHON=$(PYTHON))." >&2; \
	  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$python" --version) (once, some minutes)"; \
	rm -f $(VENV)/.stamp; \
	$(PIP) --version >/dev/null 2>&1 && [ "$$(cat $(VENV)/.place 2>/dev/null)" = "$$(pwd)" ] \
	|| { "$$python" -m venv --clear $(VENV) && pwd > $(VENV)/.place; }
ifneq ($(TORCH_INDEX),)
	@$(PIP) install --quiet --no-compile --index-url "$(TORCH_INDEX)" "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)"
else
	@$(PIP) install --quiet --no-compile -c requirements.lock "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)"
endif
# What notebooks import is compiled by importing it: torch beside the download of the rest, then all of it.
	@$(BIN)/python -c "import torch" 2>/dev/null & \
	$(PIP) install --quiet --no-compile --no-deps --only-binary :all: -r requirements.lock; status=$$?; wait; exit $$status
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "import papermill, primia_lite.apps.warm_imports"
	@echo "$(KEY)" > $(VENV)/.stamp

clean:
	rm -rf $(VENV) .venv-flower .venv-docs build runs .cache

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile
