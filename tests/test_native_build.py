"""The native libraries: what was built loads, device math to the last bits, registers and spills of CUDA kernels."""

import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from scalekern import _native
from scalekern.ops import selective_scan as scan_op

ROOT = pathlib.Path(__file__).parents[1]
RESOURCES = pathlib.Path(__file__).with_name("native_resources.json")
_C = pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")


# --- device math ---


def ulps(got, exact):
    """Error in units of the last place of float32 at the exact value."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(np.asarray(got) - exact) / np.maximum(spacing, np.float64(np.finfo(np.float32).tiny) * 2.0**-23)


def device_math(name, x):
    return np.array(_C.device_math(name, x.astype(np.float32).astype(np.float64).tolist()))


def grid(low, high, count=20001):
    return np.linspace(low, high, count).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "name, low, high, exact, limit",
    [
        ("exp2_poly", -126, 127.4, np.exp2, 1.5),
        ("exp2_poly", -1e-3, 1e-3, np.exp2, 1.0),
        ("softplus", -80, 40, lambda x: np.logaddexp(0, x), 70.0),  # e^-|x| carries the rounding of x log2 e
        ("softplus", -1, 1, lambda x: np.logaddexp(0, x), 3.0),
        ("softplus_short", -1, 40, lambda x: np.logaddexp(0, x), 25.0),  # 1.3e-6
        ("sigmoid", -80, 40, lambda x: 1 / (1 + np.exp(-x)), 70.0),
        ("silu", -5, 40, lambda x: x / (1 + np.exp(-x)), 6.0),
        # x (1 - gate) cancels: half an ulp of 1, times an x of 16
        ("silu_slope", 0, 40, lambda x: (1 + np.exp(-x) + x * np.exp(-x)) / (1 + np.exp(-x)) ** 2, 10.0),
        ("softplus_slope", 1e-6, 30, lambda d: -np.expm1(-d), 3.0),
        ("softplus_slope", 1e-12, 1e-6, lambda d: -np.expm1(-d), 3.0),
    ],
)
def test_device_math_in_ulps(name, low, high, exact, limit):
    x = grid(low, high)
    error = ulps(device_math(name, x), exact(x)).max()
    assert error <= limit, f"{name}: {error:.2f} ulp"


def test_exp2_poly_is_exact_where_a_state_does_not_decay_and_at_integers():
    x = np.arange(-126, 128, dtype=np.float64)
    assert (device_math("exp2_poly", x) == np.exp2(x)).all()
    assert device_math("exp2_poly", np.array([0.0, -0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["exp2_poly", "exp2_unit", "softplus", "softplus_short", "sigmoid", "silu"])
def test_device_math_at_the_edges(name):
    inf = float("inf")
    values = device_math(name, np.array([inf, -inf, float("nan"), -1e30, 1e30]))
    assert np.isnan(values[2])
    expected = {"exp2_poly": [inf, 0, 0, inf], "exp2_unit": [inf, 0, 0, inf], "softplus": [inf, 0, 0, np.float32(1e30)],
                "softplus_short": [inf, 0, 0, np.float32(1e30)],
                "sigmoid": [1, 0, 0, 1], "silu": [inf, None, 0, np.float32(1e30)]}[name]  # fmt: skip
    for value, want in zip(values[[0, 1, 3, 4]], expected):
        assert want is None or value == want


@pytest.mark.parametrize("name, dtype", [("round_f16", torch.float16), ("round_bf16", torch.bfloat16)])
def test_storage_conversions_equal_torch(name, dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (20000,), generator=generator)
    x = torch.randn(20000, generator=generator) * torch.exp2(exponents.float())
    ties = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.9, 65520.0, 1e6])
    tiny = torch.tensor([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 2.0**-14 - 2.0**-26, 0.0, -0.0, float("inf")])
    x = torch.cat([x, ties, -ties, tiny, -tiny])
    assert np.array_equal(_C.device_math(name, x.double().tolist()), x.to(dtype).double().numpy())
    assert np.isnan(_C.device_math(name, [float("nan")])).all()


# --- what was built ---


def test_what_was_built_loads():
    record = json.loads((_native.library_path("cpu").parent / "build.json").read_text())
    for kind in ("cpu", "cuda"):
        if f"lib/libscalekern_{kind}.so" in record["built"]:
            assert _native.load(kind) is None
        else:
            assert record["skipped"][kind], f"{kind} was neither built nor skipped with a reason"


def setup_functions():
    """The functions of setup.py, without its call of setup()."""
    source = (ROOT / "setup.py").read_text()
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "scalekern_setup"}
    exec(compile(source[: source.rindex("\nsetup(")], "setup.py", "exec"), names)
    return names


def test_a_broken_nvcc_is_one_line(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal: no cicc' >&2\nexit 1\n")
    broken.chmod(0o755)
    problem = setup_functions()["nvcc_problem"]
    assert problem(str(broken), []) == f"{broken} does not compile: nvcc fatal: no cicc"
    assert "does not run" in problem(str(tmp_path / "absent"), [])


def compiled(native):
    """[(object, the sources in it, flags)] of the compilations that a NativeBuild has planned."""
    found = []
    edge = r"^build (obj/\S+): (?:cxx|nvcc) (\S+)\n  flags = (.*)$"
    for target, source, flags in re.findall(edge, "\n".join(native.edges), re.MULTILINE):
        text = pathlib.Path(source).read_text()
        units = re.findall(r'#include "(\S+)"', text) if "/units/" in source else [source.partition("/csrc/")[2]]
        found.append((target, units, flags))
    return found


@pytest.mark.parametrize("local", [False, True])
def test_only_the_best_level_of_this_machine_is_optimized(tmp_path, monkeypatch, local):
    monkeypatch.setenv("SCALEKERN_BUILD_FOR_THIS_CPU", str(int(local)))
    monkeypatch.delenv("SCALEKERN_BUILD_CPU", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    native = setup_functions()["NativeBuild"](tmp_path)
    native.runs = lambda level: level != "avx512"
    native.cpu()
    plain = ["baseline", "avx512"] if local else []
    assert native.info["cpu"]["unoptimized"] == plain
    kernels = sorted(str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").glob("*/cpu_*_kernel.cpp"))
    for level in ("baseline", "avx2", "avx512"):
        of_level = [c for c in compiled(native) if c[0].startswith(f"obj/cpu_{level}/")]
        assert sorted(sum((sources for _, sources, _ in of_level), [])) == kernels
        assert all(("-Og" in flags) == (level in plain) for _, _, flags in of_level)


@pytest.mark.parametrize("jobs", [2, 8])
def test_every_source_is_compiled_once(tmp_path, monkeypatch, jobs):
    needs_cuda_library()
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    for kind in ("CPU", "CUDA"):
        monkeypatch.delenv(f"SCALEKERN_BUILD_{kind}", raising=False)
    native = setup_functions()["NativeBuild"](tmp_path)
    native.cpu(), native.cuda()
    csrc = ROOT / "csrc"
    ops = [*csrc.glob("*/cpu_*.cpp"), *csrc.glob("*/cuda_*.cu")]
    found = [c for c in compiled(native) if c[0].startswith(("obj/cpu/", "obj/cuda/"))]
    sources = sorted(sum((sources for _, sources, _ in found), []))
    assert sources == sorted(str(p.relative_to(csrc)) for p in ops if not p.stem.endswith("_kernel"))
    sources = [*csrc.glob("*/*.cu")]
    units = len({source.parent for source in sources}) if jobs == 2 else len(sources)
    assert len([c for c in found if c[0].startswith("obj/cuda/")]) == units


def test_architecture_flags():
    flags = setup_functions()["gencode"]("8.0;9.0a;10.0+PTX;10.0a+PTX")
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100",
        "-gencode=arch=compute_100a,code=sm_100a", "-gencode=arch=compute_100,code=compute_100",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "dtype, states, forward, backward",
    [
        (torch.float32, 128, True, True),
        (torch.float32, 129, True, False),
        (torch.float32, 512, True, False),
        (torch.float32, 513, False, False),
        (torch.float64, 128, True, True),
        (torch.float64, 129, False, False),
    ],
)
def test_what_the_cuda_scan_declines(dtype, states, forward, backward):
    u, A = torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(2, states, dtype=dtype)
    assert (scan_op._cuda_supports_fwd(u, u, A) is None) == forward
    assert (scan_op._cuda_supports_bwd(u, u, A) is None) == backward
    assert scan_op._cuda_supports_fwd(u, u, torch.zeros(2, 4, dtype=torch.complex64))


CUDA_OPS = (
    "selective_scan_fwd", "selective_scan_bwd", "selective_state_update", "causal_conv1d_fwd", "causal_conv1d_bwd",
    "causal_conv1d_update",
)  # fmt: skip


def needs_cuda_library():
    if shutil.which("nvcc") is None and not pathlib.Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc was not found")
    built = _native.library_path("cuda").exists()
    assert built, "nvcc is here, but the CUDA library was not built: see setup.py's output"
    return _native.load("cuda")


def test_cuda_library_registers_its_ops_without_a_gpu():
    assert needs_cuda_library() is None
    for op in CUDA_OPS:
        schema = getattr(torch.ops.scalekern_native, f"{op}_cuda").default._schema
        public = getattr(torch.ops.scalekern, op).default._schema
        assert [a.name for a in schema.arguments][-len(public.arguments) :] == [a.name for a in public.arguments]
    # The last three: parts of quant_matmul_fwd and fft_conv_fwd.
    for op in (*CUDA_OPS, "quant_matmul_gemv", "quant_matmul_tiles", "fft_conv"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"scalekern_native::{op}_cuda", "CUDA")


def kernels_in_logs():
    """{arch: {kernel: {registers, spill_bytes}}} out of what ptxas said when the library was built."""
    found = {}
    for log in sorted((ROOT / "build").glob("native-*/obj/cuda/**/*.log")):
        planned = (ROOT / "build" / log.relative_to(ROOT / "build").parts[0] / "build.ninja").read_text()
        if f"/{log.stem}: nvcc" not in planned:  # of an older plan
            continue
        arch = kernel = function = None
        spills = {}
        filtered = subprocess.run(["c++filt"], input=log.read_text(), capture_output=True, text=True, check=True)
        for line in filtered.stdout.splitlines():
            if entry := re.search(r"Compiling entry function '(.*)' for '(sm_\w+)'", line):
                kernel, arch, spills = entry[1], entry[2], {}
            elif properties := re.search(r"Function properties for (.*)", line):
                function = properties[1]
            elif stores := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                # Functions that are not inlined have lines of their own.
                spills[function] = int(stores[1]) + int(stores[2])
            elif used := re.search(r"Used (\d+) registers", line):
                name = re.search(r"kernel_entry<(.*?) ?>\(", kernel)[1]
                name = name.replace("scalekern::", "").replace("device::", "")
                found.setdefault(arch, {})[name] = {"registers": int(used[1]), "spill_bytes": sum(spills.values())}
    return found


def test_kernels_keep_to_their_registers():
    """Registers may drift by 8 (another compiler), spills by nothing; each recorded spill has its reason in the file.

    To record anew: python tests/test_native_build.py
    """
    needs_cuda_library()
    recorded, found = json.loads(RESOURCES.read_text()), kernels_in_logs()
    if not found:
        pytest.skip("no compiler logs beside the build (the library was installed from a wheel)")
    for arch, kernels in found.items():
        assert arch in recorded["kernels"] or arch not in ("sm_80", "sm_90a", "sm_100"), f"{arch} is not recorded"
        for name, used in kernels.items():
            limit = recorded["kernels"].get(arch, {}).get(name)
            if limit is None and arch not in recorded["kernels"]:
                continue  # an architecture that the user asked for
            assert limit is not None, f"{name} on {arch} is not recorded"
            assert used["registers"] <= limit["registers"] + 8, f"{name} on {arch}: {used}, recorded {limit}"
            assert used["spill_bytes"] <= limit["spill_bytes"], f"{name} on {arch}: {used}, recorded {limit}"
            family = name.partition("<")[0]
            assert limit["spill_bytes"] == 0 or family in recorded["reasons"], f"{family} spills without a reason"


def record_resources():
    old = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {"reasons": {}}
    record = {"reasons": old["reasons"], "kernels": kernels_in_logs()}
    RESOURCES.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record_resources()
