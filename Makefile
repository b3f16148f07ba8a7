# The two commands of the README: `make demo` runs the main job, `make test` runs the suite.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SEED ?= 0
SAN ?= 1
JOBS ?= 2

.PHONY: demo demo-emoji test test-fast test-gpu kernel-report test-arithmetics test-arithmetics-quick lint format clean

# The stamp is written last, so that an interrupted installation starts again.
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	    f'Python 3.11 or newer is needed, {v.major}.{v.minor} was found: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.lock
	@touch $@

$(VENV): $(VENV)/.installed

demo: $(VENV)/.installed
	$(PY) demo.py --seed=$(SEED) --san=$(SAN) $(if $(QUICK),--quick)

# Colours and pretrained features: minutes on a GPU, a night on a CPU. The same command again goes on.
demo-emoji: $(VENV)/.installed
	$(PY) demo.py --data=emoji --seed=$(SEED) --san=$(SAN) $(if $(QUICK),--quick)

# One thread for each of the JOBS processes: more only get in each other's way (the suite then takes twice as long).
test test-fast: export OMP_NUM_THREADS = 1

test: $(VENV)/.installed lint
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(VENV)/.installed
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

# What nvcc makes of the fast CUDA programs, for three generations of GPUs (some minutes, no GPU needed).
kernel-report: $(VENV)/.installed
	$(PY) benchmarks/kernel_report.py

# The numeric tests under arithmetics that round differently; the table goes to docs/arithmetics.md (about an hour).
test-arithmetics: $(VENV)/.installed
	$(PY) -m tests.arithmetics --jobs=$(JOBS) --dest=docs/arithmetics.md $(ARITHMETICS_ARGS)

# Those against the official numbers and of the operations, under two other settings (a minute or two).
test-arithmetics-quick: $(VENV)/.installed
	$(PY) -m tests.arithmetics --jobs=$(JOBS) --only=avx2,aten -- -m "numeric and not slow" \
	    tests/ops/test_parity.py tests/training/test_generator.py tests/training/test_convolution_forms.py \
	    tests/training/generator tests/training/discriminators/test_parity.py \
	    tests/training/discriminators/test_san.py tests/metrics/test_formulas.py

# Style, then types: pyproject.toml says what is checked. The first run reads PyTorch's types, too, and takes a minute.
lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m mypy

# What ruff can mend by itself, imports in order among it. Why not `ruff format`: see CONTRIBUTING.md.
format: $(VENV)/.installed
	$(PY) -m ruff check --fix .

clean:
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache
