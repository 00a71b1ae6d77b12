// scalekern_native::selective_scan_bwd_cuda
#include "common/cuda_launch.h"
#include "selective_scan/cuda_scan_bwd_driver.h"

namespace {

using namespace scalekern;

void selective_scan_bwd(
    Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias,
    Tensor dinitial_state, Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B,
    Tensor C, OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state,
    OptionalTensor cu_seqlens, Tensor checkpoints, bool delta_softplus, bool reverse) {
  Exec exec(u);
  scan::selective_scan_bwd(
      exec,
      {view(du), view(ddelta), view(dA), view(dB), view(dC), view(dD), view(dz), view(ddelta_bias),
       view(dinitial_state)},
      view(dout), view(dlast_state), view(checkpoints),
      {view(u), view(delta), view(A), view(B), view(C), view(D), view(z), view(delta_bias), view(initial_state),
       view(cu_seqlens), delta_softplus, reverse});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "selective_scan_bwd_cuda(Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, "
      "Tensor(f!) dD, Tensor(g!) dz, Tensor(h!) ddelta_bias, Tensor(i!) dinitial_state, Tensor dout, "
      "Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, bool delta_softplus, "
      "bool reverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("selective_scan_bwd_cuda", TORCH_BOX(&selective_scan_bwd));
}
