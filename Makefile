# make demo | make test | make bench | make gpu | make report; each sets up what it needs in ./.venv.
# On a machine whose Python already has torch: make gpu PY=python3 (nothing is downloaded).

PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
OUT ?= out/gpu

# All files but the contract's, by their first letters: parts of about two minutes keep two processes busy to the end.
REST := test-rest-a-c test-rest-d-m test-rest-n-r test-rest-s-z

.PHONY: demo test test-contract test-rest $(REST) test-interpret bench gpu report build clean

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools wheel pybind11 ninja
	$(PIP) -c constraints.txt triton || echo "scalekern: no Triton for this machine; its kernels are not tested"
	$(PIP) -c constraints.txt --no-build-isolation -e '.[test,bench,demo,hf]'
	touch $@

# Incremental: ninja compiles what has changed since.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m scalekern demo

# Processes side by side, two at a time. The interpreter's is its own: it is chosen before the kernels are imported.
test: build
	@$(MAKE) --no-print-directory -k -j2 --output-sync=target test-interpret test-contract test-rest

test-contract:
	$(PY) -m pytest -q -p no:cacheprovider tests/test_contract.py

test-rest: $(REST)

$(REST): test-rest-%:
	$(PY) -m pytest -q -p no:cacheprovider $(filter-out tests/test_contract.py,$(wildcard tests/test_[$*]*.py))

test-interpret:
	@if $(PY) -c "import triton" 2>/dev/null; then \
	  echo "Triton kernels through the interpreter:"; \
	  TRITON_INTERPRET=1 $(PY) -m pytest -q -p no:cacheprovider tests/test_contract.py tests/test_selective_scan.py \
	    tests/test_selective_state_update.py tests/test_causal_conv1d.py tests/test_triton_interpret.py \
	    tests/test_triton_fft_conv.py tests/test_triton_toeplitz_conv.py tests/test_triton_diag_ssm_kernel.py \
	    tests/test_triton_sparse_attention.py tests/test_triton_quant_matmul.py tests/test_sparse_attention.py tests/test_sparse_attention_decode.py \
	    tests/test_hstu_attention.py::test_agrees_with_the_oracle; \
	else echo "scalekern: Triton is not installed; its kernels were not tested"; fi

bench: build
	$(PY) -m scalekern bench --device cpu

report: build
	$(PY) -m scalekern report

# For a machine with a GPU: GPU-marked tests, compute-sanitizer where there is one, benchmarks in a time budget.
gpu: $(READY)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(PY) -m benchmarks.gpu_suite --out $(OUT)

clean:
	rm -rf build dist out $(VENV)/.ready
