// scalekern._C.emulate_*: the CUDA ops of the family on host memory, through the emulator (for tests).
//
// A tensor is a tuple (address, dtype code, sizes, strides); None stands for an absent one. `processors` is the number
// of SMs that the driver believes in (it decides how time is split); `order` is the order in which fibers run.
// emulated_kernels: which kernels that launched.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "selective_scan/cuda_conv1d_driver.h"
#include "selective_scan/cuda_scan_bwd_driver.h"
#include "selective_scan/cuda_scan_fwd_driver.h"
#include "selective_scan/cuda_state_update.cuh"

namespace py = pybind11;

namespace scalekern {

namespace {

using TensorTuple = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;
using Tensors = std::vector<std::optional<TensorTuple>>;

View view(const std::optional<TensorTuple>& t) {
  View v;
  if (!t) return v;
  const auto& [address, dtype, sizes, strides] = *t;
  v.data = reinterpret_cast<void*>(address), v.dtype = dtype, v.dims = int(sizes.size());
  for (int i = 0; i < v.dims; ++i) v.size[i] = sizes[i], v.stride[i] = strides[i];
  return v;
}

std::vector<std::string> launched;  // names of kernels, since they were last asked for

std::vector<std::string> emulated_kernels() { return std::exchange(launched, {}); }

class HostExec {
 public:
  HostExec(int processors, int order) : processors_(processors) { emulator::block().order = emulator::Order(order); }

  int processors() const { return processors_; }

  void* scratch(int64_t bytes) {  // poisoned: NaN in every type
    kept_.emplace_back(new (std::align_val_t(16)) unsigned char[size_t(bytes)]);
    std::memset(kept_.back().get(), 0xff, size_t(bytes));
    return kept_.back().get();
  }

  template <class Kernel>
  void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Args& args) {
    if (shared_bytes > 163 * 1024) throw std::runtime_error("more shared memory than a block has on sm_80");
    launched.push_back(py::type_id<Kernel>());
    emulator::block().template launch<Kernel>(blocks, shared_bytes, args);
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };
  int processors_;
  std::vector<std::unique_ptr<unsigned char, Free>> kept_;
};

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
  m.def("emulate_selective_scan_fwd", &selective_scan_fwd);
  m.def("emulate_selective_scan_bwd", &selective_scan_bwd);
  m.def("emulate_selective_state_update", &selective_state_update);
  m.def("emulate_causal_conv1d_fwd", &causal_conv1d_fwd);
  m.def("emulate_causal_conv1d_bwd", &causal_conv1d_bwd);
  m.def("emulate_causal_conv1d_update", &causal_conv1d_update);
}

}  // namespace scalekern
