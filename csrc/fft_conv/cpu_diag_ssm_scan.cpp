// scalekern_native::diag_ssm_scan_cpu and discretize_zoh_cpu: tensors to pointers, then this machine's kernels.
#include "common/tensor.h"
#include "fft_conv/diag_ssm_scan.h"

namespace {

using namespace scalekern;

const double* doubles(const Tensor& t) { return static_cast<const double*>(data(t)); }
const double* doubles(const OptionalTensor& t) { return static_cast<const double*>(data(t)); }

void diag_ssm_scan(
    Tensor out, OptionalTensor last, Tensor u, Tensor a, Tensor b, Tensor c, OptionalTensor skip,
    OptionalTensor initial) {
  DiagSsmScanArgs args{};
  args.batch = u.size(0), args.heads = u.size(1), args.length = u.size(2), args.states = a.size(1);
  args.wide = dtype_of(u) == Dtype::f64, args.complex = dtype_of(a) == Dtype::c128;
  args.u = data(u), args.out = data(out);
  args.a = doubles(a), args.b = doubles(b), args.c = doubles(c), args.skip = doubles(skip);
  args.initial = doubles(initial), args.last = static_cast<double*>(data(last));
  SCALEKERN_CALL(diag_ssm_scan, (args));
}

void discretize_zoh(Tensor a, Tensor b, Tensor A, Tensor B, Tensor dt) {
  DiscretizeArgs args{};
  args.heads = A.size(0), args.states = A.size(1);
  args.A = doubles(A), args.B = doubles(B), args.dt = doubles(dt);
  args.a = static_cast<double*>(data(a)), args.b = static_cast<double*>(data(b));
  SCALEKERN_CALL(discretize_zoh, (args));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "diag_ssm_scan_cpu(Tensor(a!) out, Tensor(b!)? last, Tensor u, Tensor a, Tensor b, Tensor c, Tensor? skip, "
      "Tensor? initial) -> ()");
  m.def("discretize_zoh_cpu(Tensor(a!) a, Tensor(b!) b, Tensor A, Tensor B, Tensor dt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("diag_ssm_scan_cpu", TORCH_BOX(&diag_ssm_scan));
  m.impl("discretize_zoh_cpu", TORCH_BOX(&discretize_zoh));
}
