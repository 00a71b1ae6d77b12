// pybind11 module scalekern._C: what is not a tensor op. Build info; host-compiled device math for the tests.
// One unit: pybind11 and the emulator take 8 of the 10 seconds that each of four took, 65 together where this takes 44.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/bind_device_math.h"
#include "common/bind_emulator_faults.h"
#include "common/isa.h"
#include "quant_matmul/bind_cuda_emulator.h"
#include "selective_scan/bind_cuda_emulator.h"

namespace py = pybind11;

#ifndef SCALEKERN_BUILD_INFO
#define SCALEKERN_BUILD_INFO "{}"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and host-side helpers of scalekern.";
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(SCALEKERN_BUILD_INFO); },
        "What setup.py built: compilers, instruction sets, CUDA architectures.");
  m.def("cpu_isa", [] { return std::string(scalekern::isa_name()); },
        "Instruction-set level that the CPU kernels use in this process.");
  scalekern::bind_device_math(m);
  scalekern::bind_cuda_emulator(m);
  scalekern::bind_quant_emulator(m);
  scalekern::bind_emulator_faults(m);
}
