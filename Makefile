# Every target sets up what it needs in .venv; nothing but Python 3.11-3.13 and make must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HOME_FOLDER := $(or $(SHOAL_HOME),$(HOME)/.cache/shoal)
DEMO := $(HOME_FOLDER)/outputs/demo
AUDIT := $(VENV)/audit.json
# The tests of a file share a Ray and an S3 server, and run in one process.
TWO := --numprocesses 2 --dist loadfile

# Idle OpenMP threads that spin for long slow everything else on shared cores down, up to tenfold.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 2000
export RAY_AUTH_MODE ?= disabled
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: help install demo test test-slow lint audit format bench lock clean

help:
	@echo "make demo       embed and cluster 1,000 real documents with a real LLM, then compare"
	@echo "make test       the tests that take seconds"
	@echo "make test-slow  end-to-end and fault tests, minutes"
	@echo "make lint       ruff and mypy"
	@echo "make audit      known vulnerabilities of the locked packages; needs a network"
	@echo "make bench      every benchmark but gpu.py and packaged_adapter.py; results go to benchmarks/results"
	@echo "make lock       write constraints.txt anew"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] <= (3, 13) or sys.exit("error: Python %d.%d found, 3.11 to 3.13 required: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[s3,evaluate,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python jobs/embed_corpus.py --output $(DEMO)/default --max-tokens 128
	$(BIN)/python jobs/embed_corpus.py --output $(DEMO)/prompt-alone --max-tokens 128 --adapter none
	$(BIN)/python jobs/embed_corpus.py --output $(DEMO)/no-prompt --max-tokens 128 --adapter none \
		--prompt none
	$(BIN)/python jobs/cluster_corpus.py --embeddings $(DEMO)/default --output $(DEMO)/report \
		--num-clusters 20 --label-column label
	$(BIN)/python benchmarks/demo.py --demo $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(TWO)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(TWO)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Its exit is not 0 either when something is found or when nothing could be asked; it says which.
audit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	@rm -f $(AUDIT); \
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip \
		--progress-spinner off --format json --output $(AUDIT); \
	code=$$?; \
	test -s $(AUDIT) || { echo "audit: NOT DONE, the vulnerability service gave no answer" >&2; exit 1; }; \
	test $$code = 0 && echo "audit: no known vulnerability in constraints.txt" \
		|| { echo "audit: VULNERABLE packages, listed in $(AUDIT)" >&2; exit 1; }

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	for script in $(filter-out benchmarks/gpu.py benchmarks/packaged_adapter.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# torch is held at the release that the tests ran on: newer ones bring gigabytes of CUDA packages.
lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	echo "torch==2.13.0" | $(BIN)/uv pip compile pyproject.toml - --all-extras --universal \
		--python-version 3.11 --no-emit-index-url --no-header --no-annotate --quiet \
		--output-file constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
