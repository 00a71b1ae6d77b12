// pybind11 module scalekern._C, for the tests: the device math and the CUDA kernels, compiled for the host.
// One unit: pybind11 and the emulator take 8 of the 10 seconds that each of four took, 65 together where this takes 44.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/bind_device_math.h"
#include "common/bind_emulator_faults.h"
#include "fft_conv/bind_cuda_emulator.h"
#include "quant_matmul/bind_cuda_emulator.h"
#include "selective_scan/bind_cuda_emulator.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "scalekern's device code on the host, for its tests.";
  scalekern::bind_device_math(m);
  scalekern::bind_cuda_emulator(m);
  scalekern::bind_quant_emulator(m);
  scalekern::bind_fft_emulator(m);
  scalekern::bind_emulator_faults(m);
}
