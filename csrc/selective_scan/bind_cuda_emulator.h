// scalekern._C.emulate_*: the CUDA ops of the family on host memory, through the emulator (for tests).
//
// A tensor is a tuple (address, dtype code, sizes, strides); None stands for an absent one. `processors` is the number
// of SMs that the driver believes in (it decides how time is split); `order` is the order in which fibers run.
// emulated_kernels: which kernels that launched; emulated_shared_bytes: of the last of them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "common/emulator_exec.h"
#include "selective_scan/cuda_conv1d_driver.h"
#include "selective_scan/cuda_scan_bwd_driver.h"
#include "selective_scan/cuda_scan_fwd_driver.h"
#include "selective_scan/cuda_state_update.cuh"

namespace py = pybind11;

namespace scalekern {

namespace {

using emulator::HostExec, emulator::Tensors, emulator::view;

std::vector<std::string> emulated_kernels() { return std::exchange(emulator::launched(), {}); }

scan::Inputs scan_inputs(const Tensors& t, size_t first, bool softplus, bool reverse) {
  const auto at = [&](size_t i) { return view(t.at(first + i)); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), softplus, reverse};
}

void selective_scan_fwd(const Tensors& t, bool softplus, bool reverse, int processors, int order) {
  HostExec exec(processors, order);
  scan::selective_scan_fwd(exec, view(t.at(0)), view(t.at(1)), view(t.at(2)), scan_inputs(t, 3, softplus, reverse));
}

void selective_scan_bwd(const Tensors& t, bool softplus, bool reverse, int processors, int order) {
  HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  scan::selective_scan_bwd(exec, {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)}, at(9), at(10), at(21),
                           scan_inputs(t, 11, softplus, reverse));
}

void selective_state_update(const Tensors& t, bool softplus, int processors, int order) {
  HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  update::selective_state_update(exec, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10),
                                 softplus);
}

void causal_conv1d_fwd(const Tensors& t, bool silu, int processors, int order) {
  HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  conv::causal_conv1d_fwd(exec, at(0), at(1), {at(2), at(3), at(4), at(5), at(6), at(7), silu});
}

void causal_conv1d_bwd(const Tensors& t, bool silu, int processors, int order) {
  HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  conv::causal_conv1d_bwd(exec, at(0), at(1), at(2), at(3), at(4), at(5),
                          {at(6), at(7), at(8), at(9), at(10), at(11), silu});
}

void causal_conv1d_update(const Tensors& t, bool silu, int processors, int order) {
  HostExec exec(processors, order);
  const auto at = [&](size_t i) { return view(t.at(i)); };
  conv::causal_conv1d_update(exec, at(0), at(1), at(2), at(3), at(4), at(5), at(6), silu);
}

}  // namespace

inline void bind_cuda_emulator(py::module_& m) {
  m.def("emulated_kernels", &emulated_kernels);
  m.def("emulated_shared_bytes", [] { return emulator::shared_of_last(); });
  m.def("emulate_selective_scan_fwd", &selective_scan_fwd);
  m.def("emulate_selective_scan_bwd", &selective_scan_bwd);
  m.def("emulate_selective_state_update", &selective_state_update);
  m.def("emulate_causal_conv1d_fwd", &causal_conv1d_fwd);
  m.def("emulate_causal_conv1d_bwd", &causal_conv1d_bwd);
  m.def("emulate_causal_conv1d_update", &causal_conv1d_update);
}

}  // namespace scalekern
