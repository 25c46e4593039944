# The two commands of the README: `make demo` and `make test` each create the environment they need.
PYTHON ?= python3
VENV ?= .venv
# Without a GPU; elsewhere e.g. TORCH="torch --index-url https://download.pytorch.org/whl/cpu", or a CUDA build.
TORCH ?= torch==2.13.0
JOBS ?= 2

# What `make demo` starts from: a checkpoint folder or Hub id, a text file, how long to fine-tune.
MODEL ?=
TEXT ?=
STEPS ?=
OUT ?= runs/quickstart

# On a CPU, glibc gives the memory of large tensors back after every step, unless told so: docs/cost.md.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(KEEP_MEMORY) $(VENV)/bin/python examples/quickstart.py --output $(OUT) $(if $(MODEL),--model $(MODEL)) \
	    $(if $(TEXT),--text $(TEXT)) $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n $(JOBS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
