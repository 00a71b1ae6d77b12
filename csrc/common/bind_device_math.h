// scalekern._C.device_math: the device math of the CUDA kernels as the host compiler sees it, elementwise over a list.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/device_math.cuh"

namespace py = pybind11;

namespace scalekern {

namespace {

using namespace device;

template <class F>
std::vector<double> map(const std::vector<double>& x, F&& f) {
  std::vector<double> y;
  y.reserve(x.size());
  for (double v : x) y.push_back(double(f(float(v))));
  return y;
}

std::vector<double> device_math(const std::string& name, const std::vector<double>& x) {
  if (name == "exp2_poly") return map(x, [](float v) { return exp2_poly(v); });
  if (name == "exp2_unit") return map(x, [](float v) { return exp2_unit(v); });
  if (name == "softplus") return map(x, [](float v) { return softplus(v); });
  if (name == "softplus_short") return map(x, [](float v) { return softplus_short(v); });
  if (name == "softplus_slope") return map(x, [](float v) { return softplus_slope(v); });
  if (name == "sigmoid") return map(x, [](float v) { return sigmoid(v); });
  if (name == "silu") return map(x, [](float v) { return silu(v); });
  if (name == "silu_slope") return map(x, [](float v) { return silu_slope(v, sigmoid(v)); });
  if (name == "round_f16") return map(x, [](float v) { return widen(narrow<f16>(v)); });
  if (name == "round_bf16") return map(x, [](float v) { return widen(narrow<bf16>(v)); });
  throw py::value_error("device_math: unknown function " + name);
}

}  // namespace

inline void bind_device_math(py::module_& m) {
  m.def("device_math", &device_math, py::arg("name"), py::arg("x"),
        "A float32 device function, applied to each number.");
}

}  // namespace scalekern
