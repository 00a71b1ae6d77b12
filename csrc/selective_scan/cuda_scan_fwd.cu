// scalekern_native::selective_scan_fwd_cuda
#include "common/cuda_launch.h"
#include "selective_scan/cuda_scan_fwd_driver.h"

namespace {

using namespace scalekern;

void selective_scan_fwd(
    Tensor out, Tensor last_state, Tensor checkpoints, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
    OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state,
    OptionalTensor cu_seqlens, bool delta_softplus, bool reverse, bool save_checkpoints) {
  Exec exec(u);
  scan::selective_scan_fwd(
      exec, view(out), view(last_state), view(checkpoints),
      {view(u), view(delta), view(A), view(B), view(C), view(D), view(z), view(delta_bias), view(initial_state),
       view(cu_seqlens), delta_softplus, reverse});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "selective_scan_fwd_cuda(Tensor(a!) out, Tensor(b!) last_state, Tensor(c!) checkpoints, Tensor u, Tensor delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool delta_softplus, bool reverse, bool save_checkpoints) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("selective_scan_fwd_cuda", TORCH_BOX(&selective_scan_fwd));
}
