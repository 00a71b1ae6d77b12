// scalekern._C.emulate_quant_matmul_gemv, _tiles: the CUDA ops on host memory, through the emulator (for tests).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/emulator_exec.h"
#include "quant_matmul/cuda_quant_gemv_driver.h"
#include "quant_matmul/cuda_quant_tiles_driver.h"

namespace py = pybind11;

namespace scalekern {

namespace {

using emulator::Tensors, emulator::view;

void quant_matmul_gemv(
    const Tensors& t, int64_t bits, double step, double base, double zero, int64_t group, int processors, int order) {
  emulator::HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  gemv::quant_matmul_gemv(exec, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), bits, step, base, zero,
                          group);
}

void quant_matmul_tiles(const Tensors& t, int64_t bits, int64_t group, int processors, int order) {
  emulator::HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  tiles::quant_matmul_tiles(exec, at(0), at(1), at(2), at(3), at(4), at(5), at(6), bits, group);
}

}  // namespace

void bind_quant_emulator(py::module_& m) {
  m.def("emulate_quant_matmul_gemv", &quant_matmul_gemv);
  m.def("emulate_quant_matmul_tiles", &quant_matmul_tiles);
}

}  // namespace scalekern
