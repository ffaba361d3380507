# Everything from a bare clone: `make demo` and `make test` install what they need, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# An index to install torch from, such as PyTorch's own index of CPU builds; empty: pip's default.
TORCH_INDEX ?=

.PHONY: demo test lint install clean-demo

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' 'setuptools>=77'
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --group dev -e '.[hf,plot,postgres,dashboard]'
	touch $@

demo: $(INSTALLED)
	@sh examples/demo/run.sh $(BIN)/apportion $(BIN)/python

clean-demo:
	rm -rf demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal -q
