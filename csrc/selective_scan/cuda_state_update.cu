// scalekern_native::selective_state_update_cuda
#include "common/cuda_launch.h"
#include "selective_scan/cuda_state_update.cuh"

namespace {

using namespace scalekern;

void selective_state_update(
    Tensor out, Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
    OptionalTensor dt_bias, OptionalTensor state_batch_indices, bool dt_softplus) {
  Exec exec(x);
  update::selective_state_update(
      exec, view(out), view(state), view(x), view(dt), view(A), view(B), view(C), view(D), view(z), view(dt_bias),
      view(state_batch_indices), dt_softplus);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "selective_state_update_cuda(Tensor(a!) out, Tensor(b!) state, Tensor x, Tensor dt, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("selective_state_update_cuda", TORCH_BOX(&selective_state_update));
}
