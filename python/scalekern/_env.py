"""Every environment variable that scalekern reads, in one place.

Build time (read by setup.py, listed here so that this page is complete):
  SCALEKERN_BUILD_CUDA   1 | 0 | auto   build the CUDA library (auto: when nvcc is found)
  SCALEKERN_BUILD_CPU    1 | 0 | auto   build the CPU library (auto: when a C++ compiler is found)
  SCALEKERN_BUILD_FOR_THIS_CPU   1 | 0   only the CPU kernels of this machine's best level are optimized (default: 0)
  TORCH_CUDA_ARCH_LIST   e.g. "9.0a"    architectures of the CUDA library
  MAX_JOBS               parallel compile jobs
"""

import os

_FALSE = ("", "0", "false", "no", "off")


# os.environ.get takes a microsecond where there is no such variable, in every call of an op: it catches an exception.
_raw, _BACKEND = os.environ._data, os.environ.encodekey("SCALEKERN_BACKEND")


def backend() -> str | None:
    """SCALEKERN_BACKEND: the one backend that every call must use (reference, cpu, triton, cuda)."""
    return os.environ["SCALEKERN_BACKEND"] or None if _BACKEND in _raw else None


def strict() -> bool:
    """SCALEKERN_STRICT=1: a call on an accelerator that would fall back to `reference` is an error."""
    return os.environ.get("SCALEKERN_STRICT", "").lower() not in _FALSE


def triton_interpret() -> bool:
    """TRITON_INTERPRET=1: Triton kernels run through Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() not in _FALSE


def cpu_isa() -> str | None:
    """SCALEKERN_CPU_ISA: cap on the instruction set of the CPU kernels (baseline, avx2, avx512, vnni, bf16, amx).

    The native library reads it once, when it is loaded.
    """
    return os.environ.get("SCALEKERN_CPU_ISA") or None


def force_int64() -> bool:
    """SCALEKERN_FORCE_INT64=1: Triton kernels use 64-bit offsets whatever the size (for tests)."""
    return os.environ.get("SCALEKERN_FORCE_INT64", "").lower() not in _FALSE


def cache_dir() -> str:
    """SCALEKERN_CACHE: folder of the user's own tunings (default ~/.cache/scalekern)."""
    return os.environ.get("SCALEKERN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "scalekern"
    )
