"""Builds the native parts of scalekern with ninja; says in one line each what it built and what it skipped, and why.

  lib/libscalekern_cpu.so    csrc/**/cpu_*.cpp; the *_kernel.cpp once for every instruction-set level
                             (SCALEKERN_BUILD_FOR_THIS_CPU=1: unoptimized, but for the best that this machine runs)
  lib/libscalekern_cuda.so   csrc/**/cuda_*.cu (SCALEKERN_BUILD_CUDA=1|0|auto; TORCH_CUDA_ARCH_LIST)
  _C                         csrc/bindings.cpp, which includes csrc/**/bind_*.h (pybind11)
  lib/build.json             what was built and what was not, read by `python -m scalekern doctor`

Both libraries use torch's stable ABI only: one build serves every torch from 2.10 and every Python.
"""

import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"  # 10.0 without the a: its PTX is the one that later chips take, compiled once
ISA_FLAGS = {
    # x86 without AVX2, in a third of -O3's time; other machines have no other level, and take -O3.
    "baseline": "-O1 -Wno-maybe-uninitialized",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
}
# What kernels gain from -O3 over -O2: all of it takes twice as long to compile (attention's backward 22 s for 10), with
# 0.99 of the time to run, the geometric mean of 28 kernels. Unpacking gains from all of it (int1, one token: 1.4), and
# FFTs may (0.91 beside their rivals; 25 s for 12). Below -O3 gcc does not see that a loop over all lanes writes a vector.
OPTIMIZE = {
    "": "-O2 -fpeel-loops -fvect-cost-model=dynamic -Wno-maybe-uninitialized",
    "quant_matmul": "-O3",
    "fft_conv": "-O3",
}
CXX_FLAGS = (
    "-fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math "
    "-Wall -Wno-unknown-pragmas"
)


def torch_root() -> pathlib.Path | None:
    spec = importlib.util.find_spec("torch")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def find_ninja() -> str | None:
    try:
        import ninja

        return str(pathlib.Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (pathlib.Path(home) / "bin" / "nvcc").exists():
        return str(pathlib.Path(home) / "bin" / "nvcc")
    default = pathlib.Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.exists() else None)


def wanted(kind: str) -> str:
    value = os.environ.get(f"SCALEKERN_BUILD_{kind.upper()}", "auto").lower()
    if value not in ("1", "0", "auto"):
        raise SystemExit(f"SCALEKERN_BUILD_{kind.upper()} must be 1, 0 or auto, got {value!r}")
    return value


def gencode(arch_list: str) -> list[str]:
    flags = []
    for arch in arch_list.replace(" ", ";").split(";"):
        name, plus, _ = arch.partition("+")
        number = name.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if plus:  # plain PTX: the architecture-specific kind would not run on a later chip
            plain = number.rstrip("af")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def known_archs(nvcc: str, archs: str) -> str:
    """Those of `archs` that this nvcc can compile for (an older one does not know the newest)."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    except OSError:
        return archs  # nvcc_problem says it
    known = [a for a in archs.split(";") if f"sm_{a.partition('+')[0].replace('.', '').rstrip('af')}" in listed]
    return ";".join(known) or archs


def nvcc_problem(nvcc: str, flags: list[str]) -> str | None:
    """Why nvcc cannot compile a kernel of one line, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "trial.cu")
        source.write_text("__global__ void trial() {}\n")
        command = [nvcc, "-std=c++20", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{nvcc} does not run: {error}"
    if result.returncode == 0:
        return None
    said = (result.stderr or result.stdout).strip().splitlines()
    return f"{nvcc} does not compile: {said[0] if said else f'exit status {result.returncode}'}"


class NativeBuild:
    """One build.ninja for the three products; skipped ones leave their reason in `skipped`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.edges: list[str] = []
        self.products: dict[str, pathlib.Path] = {}
        self.skipped: dict[str, str] = {}
        self.info: dict = {"python": platform.python_version(), "machine": platform.machine()}
        self.torch = torch_root()
        self.cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        self.gcc = bool(self.cxx) and "clang" not in first_line([self.cxx, "--version"])
        self.ninja = find_ninja()
        self.jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        self.obstacle = (
            "no C++ compiler was found (set CXX)" if not self.cxx
            else "ninja is not installed" if not self.ninja
            else "torch is not installed in the build environment" if not self.torch
            else None
        )  # fmt: skip

    def edge(self, target: str, rule: str, source: pathlib.Path, flags: str) -> None:
        optimize = OPTIMIZE.get(source.parent.name, OPTIMIZE[""]) if self.gcc else "-O3"
        self.edges.append(f"build {target}: {rule} {source}\n  flags = {flags}\n  optimize = {optimize}\n")

    def compile(self, rule: str, source: pathlib.Path, label: str, flags: str) -> str:
        target = f"obj/{label}/{source.relative_to(CSRC).with_suffix('.o').as_posix()}"
        self.edge(target, rule, source, flags)
        return target

    def unit(self, rule: str, sources: list[pathlib.Path], label: str, flags: str) -> list[str]:
        """Compiles the sources of a folder as one: their headers are read once, templates that they share made once."""
        objects = []
        for folder in sorted({source.parent for source in sources}):
            path = self.folder / "units" / f"{label}_{folder.name}{sources[0].suffix}"
            includes = [f'#include "{s.relative_to(CSRC).as_posix()}"\n' for s in sources if s.parent == folder]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != "".join(includes):  # unchanged, it is not compiled again
                path.write_text("".join(includes))
            target = f"obj/{label}/{folder.name}.o"
            self.edge(target, rule, path, flags)
            objects.append(target)
        return objects

    def link(self, name: str, output: str, objects: list[str], flags: str, rule: str = "link") -> None:
        self.edges.append(f"build {output}: {rule} {' '.join(objects)}\n  flags = {flags}\n")
        self.products[name] = self.folder / output

    @property
    def torch_flags(self) -> str:
        include = self.torch / "include"
        return f"-I{CSRC} -isystem {include} -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY"

    def link_flags(self) -> str:
        # libtorch.so is named so that on a CUDA build of torch its symbols are found through it.
        return f"-L{self.torch / 'lib'} -Wl,--no-as-needed -ltorch_cpu -ltorch"

    def cpu(self) -> None:
        if not self.allow("cpu"):
            return
        x86 = platform.machine() in ("x86_64", "AMD64")
        levels = ISA_FLAGS if x86 else {"baseline": ""}
        local = os.environ.get("SCALEKERN_BUILD_FOR_THIS_CPU", "0") == "1"
        best = [level for level in levels if self.runs(level)][-1]
        unoptimized = [level for level in levels if local and level != best]
        levels = {level: f"{march} -Og" if level in unoptimized else march for level, march in levels.items()}
        sources = sorted(CSRC.glob("*/cpu_*.cpp"))
        kernels = [source for source in sources if source.stem.endswith("_kernel")]
        # 1.0 of the 2.4 seconds of an op's file are torch's headers, and most of the rest its boxing of the same types.
        objects = self.unit("cxx", [source for source in sources if source not in kernels], "cpu", self.torch_flags)
        for level, march in sorted(levels.items(), key=lambda item: item[0] != best):  # the longest first
            flags = f"-I{CSRC} {march} -DSCALEKERN_ISA={level}"
            objects += [self.compile("cxx", source, f"cpu_{level}", flags) for source in kernels]
        self.link("lib/libscalekern_cpu.so", "libscalekern_cpu.so", objects, self.link_flags())
        compiler = first_line([self.cxx, "--version"])
        self.info["cpu"] = {"isa": list(levels), "unoptimized": unoptimized, "compiler": compiler}

    def runs(self, level: str) -> bool:
        """Whether this machine has a level's instructions."""
        native = [self.cxx, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
        macros = subprocess.run(native, capture_output=True, text=True).stdout
        return {"avx2": "__AVX2__", "avx512": "__AVX512VL__"}.get(level, "") in macros

    def cuda(self) -> None:
        if not self.allow("cuda"):
            return
        nvcc = find_nvcc()
        if nvcc is None:
            if wanted("cuda") == "1":
                raise SystemExit("SCALEKERN_BUILD_CUDA=1, but nvcc was not found (put it on PATH or set CUDA_HOME)")
            self.skipped["cuda"] = "nvcc was not found (put it on PATH or set CUDA_HOME)"
            return
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_archs(nvcc, CUDA_ARCHS)
        if broken := nvcc_problem(nvcc, gencode(archs)):
            if wanted("cuda") == "1":
                raise SystemExit(f"SCALEKERN_BUILD_CUDA=1, but {broken}")
            self.skipped["cuda"] = broken
            return
        self.nvcc = nvcc
        flags = " ".join([*gencode(archs), self.torch_flags.replace("-isystem ", "-isystem="), "-DUSE_CUDA"])
        sources = sorted(CSRC.glob("*/cuda_*.cu"))
        # A source costs 8 CPU seconds before its first kernel: few jobs compile a family's as one (149 instead of 179).
        if self.jobs < 4:
            objects = self.unit("nvcc", sources, "cuda", flags)
        else:
            objects = [self.compile("nvcc", source, "cuda", flags) for source in sources]
        # nvcc links, since it knows where its runtime lies; the runtime is linked statically.
        flags = self.link_flags().replace("-Wl,", "-Xlinker ")
        self.link("lib/libscalekern_cuda.so", "libscalekern_cuda.so", objects, flags, rule="nvlink")
        self.info["cuda"] = {"archs": archs, "compiler": last_line([nvcc, "--version"])}

    def bindings(self) -> None:
        if not self.allow("C"):
            return
        try:
            import pybind11
        except ImportError:
            self.skipped["C"] = "pybind11 is not installed in the build environment"
            return
        # -Og: tests call it. The CUDA kernels that it emulates compile in 34 CPU seconds and their tests take 31
        # (-O1: 51 and 24; -O0: 26 and 59).
        flags = f"-Og -I{CSRC} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        objects = [self.compile("cxx", CSRC / "bindings.cpp", "bind", flags)]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.link(f"_C{suffix}", f"_C{suffix}", objects, "")

    def allow(self, kind: str) -> bool:
        if kind != "C" and wanted(kind) == "0":
            self.skipped[kind] = f"SCALEKERN_BUILD_{kind.upper()}=0"
        elif self.obstacle:
            self.skipped[kind] = self.obstacle
        return kind not in self.skipped

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bindings()  # first: its emulator of the CUDA kernels is the longest single compilation
        self.cuda()
        self.cpu()
        if self.products:
            rules = (
                f"rule cxx\n  command = {self.cxx} -std=c++20 $optimize {CXX_FLAGS} $flags -MMD -MF $out.d"
                f" -c $in -o $out\n"
                f"  depfile = $out.d\n  deps = gcc\n  description = c++ $out\n"
                # No -lineinfo, a tenth of the time and two thirds of the library; NVCC_APPEND_FLAGS=-lineinfo for ncu.
                f"rule nvcc\n  command = {getattr(self, 'nvcc', 'nvcc')} -std=c++20 -O3 --expt-relaxed-constexpr "
                f"-Xcompiler -fPIC,-fvisibility=hidden --ptxas-options=-v $flags -MMD -MF $out.d -c $in -o $out"
                f" > $out.log 2>&1 || (cat $out.log; false)\n"
                f"  depfile = $out.d\n  deps = gcc\n  description = nvcc $out\n"
                f"rule nvlink\n  command = {getattr(self, 'nvcc', 'nvcc')} -shared $in $flags -o $out\n"
                f"  description = link $out\n"
                f"rule link\n  command = {self.cxx} -shared $in $flags -o $out\n  description = link $out\n"
            )
            ninja_file = self.folder / "build.ninja"
            ninja_file.write_text(rules + "\n".join(self.edges))
            subprocess.run([self.ninja, "-C", str(self.folder), "-j", str(self.jobs)], check=True)
        for name in self.products:
            print(f"scalekern: built {name}")
        for kind, reason in self.skipped.items():
            print(f"scalekern: skipped {kind}: {reason}")


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]


def last_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1]


class BuildNative(build_ext):
    def run(self):
        native = NativeBuild(ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        native.run()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT / "python" if inplace else pathlib.Path(self.build_lib)) / "scalekern"
        (package / "lib").mkdir(parents=True, exist_ok=True)
        for stale in [*(package / "lib").glob("libscalekern_*.so"), *package.glob("_C*.so")]:
            stale.unlink()
        for name, path in native.products.items():
            # A rename, so that a process that has the old library mapped keeps it.
            shutil.copy2(path, package / f"{name}.new")
            os.replace(package / f"{name}.new", package / name)
        record = {**native.info, "built": list(native.products), "skipped": native.skipped}
        (package / "lib" / "build.json").write_text(json.dumps(record, indent=1))
        self._written = [str(package / n) for n in (*native.products, "lib/build.json")]

    def get_outputs(self):
        return getattr(self, "_written", [])

    def get_output_mapping(self):
        return {}


setup(
    packages=[
        "scalekern", "scalekern.ops", "scalekern.reference", "scalekern.testing", "scalekern.nn", "scalekern.compat",
        "scalekern.integrations", "scalekern.masks", "scalekern.cli", "scalekern.demo", "scalekern.quant",
        "scalekern.quant.readers", "scalekern.benchmarks", "scalekern.triton_kernels",
        "scalekern.triton_kernels.configs",
    ],
    package_dir={"": "python", "scalekern.triton_kernels": "triton_kernels", "scalekern.benchmarks": "benchmarks"},
    package_data={"scalekern.triton_kernels.configs": ["*.json"], "scalekern": ["py.typed", "fastest.json"]},
    ext_modules=[Extension("scalekern._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)  # fmt: skip
