# make demo | make test | make bench | make gpu | make report; each sets up what it needs in ./.venv.
# On a machine whose Python already has torch: make gpu PY=python3 (nothing is downloaded).

PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check --no-compile
OUT ?= out/gpu

CONTRACT := tests/test_contract.py tests/test_contract_calls.py

# All files but those and the compilation's, by their first letters: parts of one to three minutes keep two processes
# busy to the end.
REST := test-rest-a-c test-rest-d-m test-rest-n-r test-rest-s-z

# What Triton's interpreter runs; a file a line.
INTERPRETED := $(addprefix tests/, \
  test_causal_conv1d.py \
  test_contract.py \
  test_contract_calls.py \
  test_cross_scan.py \
  test_hadamard_transform.py \
  test_quant_matmul_experts.py \
  test_quantize_kv.py \
  test_selective_scan.py \
  test_selective_state_update.py \
  test_sparse_attention.py \
  test_sparse_attention_decode.py \
  test_triton_codes.py \
  test_triton_diag_scan.py \
  test_triton_diag_ssm_kernel.py \
  test_triton_fft_conv.py \
  test_triton_fft_conv_long.py \
  test_triton_interpret.py \
  test_triton_quant_matmul.py \
  test_triton_sparse_attention.py \
  test_triton_ssd_scan.py \
  test_triton_toeplitz_conv.py \
  test_hstu_attention.py::test_agrees_with_the_oracle)

.PHONY: demo test test-contract test-compile test-rest $(REST) test-interpret bench gpu report build clean \
  install-native install-extras

# The CUDA library is built for the GPUs of this machine, or for one architecture where there are none: its 149 CPU
# seconds are then more than double. All of them: TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0+PTX", what a wheel has by default.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/^9.0$$/9.0a/' | paste -sd ';')
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPUS),9.0a)

# Likewise the CPU library: the best level that this machine runs is what users get; the others, which are there to be
# tested, are compiled without optimization (avx2: 35 CPU seconds instead of 169). Timing them needs a build with 0.
export SCALEKERN_BUILD_FOR_THIS_CPU ?= 1

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

# --no-compile: pip's compiling of all 10,929 modules took half of its 93 s; the tests import a fraction of them. Those
# are kept, or each of ten processes would compile them again (an import of torch and inductor: 12 s instead of 6).
unexport PYTHONDONTWRITEBYTECODE

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools wheel pybind11 ninja
	@$(MAKE) --no-print-directory -j2 install-native install-extras
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Side by side: the first needs nothing of what the second installs, and takes both cores.
install-native:
	$(PY) setup.py -q build_ext --inplace

install-extras:
	$(PIP) -c constraints.txt triton || echo "scalekern: no Triton for this machine; its kernels are not tested"
	$(PY) -c "$$EXTRAS" | xargs $(PIP) -c constraints.txt

define EXTRAS
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(repr(r) for e in ("test", "bench", "demo", "hf") for r in extras[e]))
endef
export EXTRAS

# Incremental: ninja compiles what has changed since.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

demo: build
	$(PY) -m scalekern demo

# Processes side by side, two at a time, the longest first. The interpreter's is its own: it is chosen before the
# kernels are imported. With nothing in Triton's cache test-compile is the longest, with a full one the shortest.
test: build
	@$(MAKE) --no-print-directory -k -j2 --output-sync=target test-compile test-contract test-interpret test-rest

# Two processes of two threads on two cores: a thread that waits by spinning takes the core from the one it waits for
# (300 small calls beside other work: 4.8 CPU seconds, 0.4 when waiting sleeps).
test-contract test-compile $(REST) test-interpret: export OMP_WAIT_POLICY = passive

test-contract:
	$(PY) -m pytest -q -p no:cacheprovider $(CONTRACT)

test-compile:
	$(PY) -m pytest -q -p no:cacheprovider tests/test_triton_compile.py

test-rest: $(REST)

$(REST): test-rest-%:
	$(PY) -m pytest -q -p no:cacheprovider \
	  $(filter-out $(CONTRACT) tests/test_triton_compile.py,$(wildcard tests/test_[$*]*.py))

test-interpret:
	@if $(PY) -c "import triton" 2>/dev/null; then \
	  echo "Triton kernels through the interpreter:"; \
	  TRITON_INTERPRET=1 $(PY) -m pytest -q -p no:cacheprovider $(INTERPRETED); \
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
