// scalekern_native::selective_state_update_cpu: tensors to pointers and strides, then the kernel of this machine's ISA.
#include "common/tensor.h"
#include "selective_scan/state_update.h"

namespace {

using namespace scalekern;

void update(
    const Tensor& out, const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptionalTensor& scale, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& dt_bias, const OptionalTensor& indices, bool softplus) {
  StateUpdateArgs a{};
  a.batch = x.size(0), a.heads = x.size(1), a.dim = x.size(2), a.states = A.size(2);
  a.heads_per_group = a.heads / B.size(1);
  a.io_dtype = int(dtype_of(x)), a.state_dtype = int(dtype_of(state));
  a.indices_are_int64 = indices.has_value() && dtype_of(*indices) == Dtype::i64;
  a.softplus = softplus;
  a.state = data(state), a.out = data(out);
  a.x = data(x), a.dt = data(dt), a.A = data(A), a.B = data(B), a.C = data(C), a.D = data(D), a.z = data(z);
  a.dt_bias = data(dt_bias), a.indices = data(indices);
  a.state_s = stride(state, 0), a.state_h = stride(state, 1), a.state_p = stride(state, 2),
  a.state_n = stride(state, 3);
  a.x_b = stride(x, 0), a.x_h = stride(x, 1), a.x_p = stride(x, 2);
  a.dt_b = stride(dt, 0), a.dt_h = stride(dt, 1), a.dt_p = stride(dt, 2);
  a.z_b = stride(z, 0), a.z_h = stride(z, 1), a.z_p = stride(z, 2);
  a.A_h = stride(A, 0), a.A_p = stride(A, 1), a.A_n = stride(A, 2);
  a.B_b = stride(B, 0), a.B_g = stride(B, 1), a.B_n = stride(B, 2);
  a.C_b = stride(C, 0), a.C_g = stride(C, 1), a.C_n = stride(C, 2);
  a.D_h = stride(D, 0), a.D_p = stride(D, 1), a.bias_h = stride(dt_bias, 0), a.bias_p = stride(dt_bias, 1);
  a.indices_b = stride(indices, 0);
  a.state_scale = data(scale), a.scale_h = stride(scale, 0), a.scale_p = stride(scale, 1);
  for (int64_t b = 0; indices.has_value() && b < a.batch; ++b) {
    const int64_t slot = a.indices_are_int64 ? static_cast<const int64_t*>(a.indices)[b * a.indices_b]
                                             : static_cast<const int32_t*>(a.indices)[b * a.indices_b];
    STD_TORCH_CHECK(
        slot < state.size(0), scale.has_value() ? "quantized" : "selective",
        "_state_update: state_batch_indices must be below ", state.size(0), ", got ", slot);
  }
  SCALEKERN_CALL(selective_state_update, (a));
}

void selective_state_update(
    Tensor out, Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor dt_bias, OptionalTensor indices, bool softplus) {
  update(out, state, x, dt, A, B, C, OptionalTensor(), D, z, dt_bias, indices, softplus);
}

void quantized_state_update(
    Tensor out, Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state_scale, OptionalTensor D,
    OptionalTensor z, OptionalTensor dt_bias, OptionalTensor indices, bool softplus) {
  update(out, state, x, dt, A, B, C, state_scale, D, z, dt_bias, indices, softplus);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "selective_state_update_cpu(Tensor(a!) out, Tensor(b!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> ()");
  m.def(
      "quantized_state_update_cpu(Tensor(a!) out, Tensor(b!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor state_scale, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("quantized_state_update_cpu", TORCH_BOX(&quantized_state_update));
  m.impl("selective_state_update_cpu", TORCH_BOX(&selective_state_update));
}
