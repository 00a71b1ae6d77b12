// scalekern._C.emulate_fault: one small kernel with a defect by choice, for the tests of the emulator's own detectors.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_pipeline.cuh"

namespace py = pybind11;

namespace scalekern {

namespace {

using namespace device;

// out[i] = in[(i + 1) % 128], by way of shared memory.
struct Rotate {
  struct Args {
    const float* in;
    float* out;
    std::string fault;
  };
  static constexpr int kThreads = 128;

  static SK_DEVICE void run(const Args& a) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    const bool asynchronous = a.fault.starts_with("copy");
    if (asynchronous) {
      const int offset = a.fault == "copy is misaligned" ? 1 : 0;
      if (i < kThreads / 4) copy_async(tile + 4 * i, a.in + 4 * i + offset);
      copy_commit();
      if (a.fault != "copy is not waited for") copy_wait();
    } else if (a.fault.starts_with("group")) {
      if (i < kThreads / 4) copy_in_group(tile + 4 * i, a.in + 4 * i);
      copy_group();
      if (a.fault == "group is not waited for") copy_wait_but<1>();
      else copy_wait_but<0>();
    } else if (a.fault != "element is not written" || i != 5) {
      tile[i + (a.fault == "write past the end" && i == kThreads - 1)] = a.in[i];
    }
    if (a.fault == "barrier skipped by a thread" && i == 5) return;
    if (a.fault != "no barrier") sync_threads();
    if (a.fault == "group over what is read" && i >= kThreads * 3 / 4) {  // zeros
      copy_in_group(tile + 4 * i - 3 * kThreads, a.in, false);
      copy_group();
    }
    a.out[i] = tile[(i + 1) % kThreads];
  }
};

std::vector<float> emulate_fault(const std::string& fault, int order) {
  alignas(16) float in[Rotate::kThreads + 4];
  for (int i = 0; i < Rotate::kThreads + 4; ++i) in[i] = float(i);
  std::vector<float> out(Rotate::kThreads, -1.0f);
  emulator::block().order = emulator::Order(order);
  emulator::block().launch<Rotate>(1, sizeof(float) * Rotate::kThreads, {in, out.data(), fault});
  return out;
}

}  // namespace

inline void bind_emulator_faults(py::module_& m) { m.def("emulate_fault", &emulate_fault); }

}  // namespace scalekern
