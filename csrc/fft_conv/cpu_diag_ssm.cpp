// scalekern_native::powers_sum_cpu and moments_cpu: tensors to pointers, then the kernels of this machine's ISA.
#include "common/tensor.h"
#include "fft_conv/diag_ssm.h"

namespace {

using namespace scalekern;

PowersArgs arguments(const Tensor& series, const Tensor& a) {
  PowersArgs args{};
  args.rows = series.size(0), args.heads = series.size(1), args.length = series.size(2), args.states = a.size(1);
  args.wide = dtype_of(series) == Dtype::f64, args.complex = dtype_of(a) == Dtype::c128;
  args.a = static_cast<const double*>(data(a));
  return args;
}

void powers_sum(Tensor out, Tensor w, Tensor a) {
  PowersArgs args = arguments(out, a);
  args.out = data(out), args.w = static_cast<const double*>(data(w));
  expect_writes(out);
  SCALEKERN_CALL(powers_sum, (args));
}

void moments(Tensor m0, OptionalTensor m1, Tensor g, Tensor a) {
  PowersArgs args = arguments(g, a);
  args.g = data(g), args.m0 = static_cast<double*>(data(m0)), args.m1 = static_cast<double*>(data(m1));
  SCALEKERN_CALL(moments, (args));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def("powers_sum_cpu(Tensor(a!) out, Tensor w, Tensor a) -> ()");
  m.def("moments_cpu(Tensor(a!) m0, Tensor(b!)? m1, Tensor g, Tensor a) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("powers_sum_cpu", TORCH_BOX(&powers_sum));
  m.impl("moments_cpu", TORCH_BOX(&moments));
}
