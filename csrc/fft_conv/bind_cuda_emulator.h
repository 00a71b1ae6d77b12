// scalekern._C.emulate_fft_conv, emulate_fft_filters: the CUDA ops on host memory, through the emulator (for tests).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/emulator_exec.h"
#include "fft_conv/cuda_fft_conv_driver.h"

namespace scalekern {

inline void bind_fft_emulator(pybind11::module_& m) {
  m.def("emulate_fft_conv", [](const emulator::Tensors& t, int64_t points, int processors, int order) {
    emulator::HostExec exec(processors, order);
    const auto at = [&](size_t i) { return emulator::view(t.at(i)); };
    fft::fft_conv(exec, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), points);
  });
  m.def("emulate_fft_filters",
        [](const emulator::Tensors& t, int64_t offset, int64_t period, int64_t behind, int64_t ahead, int64_t points,
           int processors, int order) {
          emulator::HostExec exec(processors, order);
          const auto at = [&](size_t i) { return emulator::view(t.at(i)); };
          fft::fft_filters(exec, at(0), at(1), at(2), at(3), at(4), offset, period, behind, ahead, points);
        });
}

}  // namespace scalekern
