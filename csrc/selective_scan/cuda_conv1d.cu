// scalekern_native::causal_conv1d_fwd_cuda, causal_conv1d_bwd_cuda, causal_conv1d_update_cuda
#include "common/cuda_launch.h"
#include "selective_scan/cuda_conv1d_driver.h"

namespace {

using namespace scalekern;

void causal_conv1d_fwd(
    Tensor out, Tensor final_states, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx,
    OptionalTensor cu_seqlens, OptionalTensor initial_states, bool silu) {
  Exec exec(x);
  conv::causal_conv1d_fwd(
      exec, view(out), view(final_states),
      {view(x), view(weight), view(bias), view(seq_idx), view(cu_seqlens), view(initial_states), silu});
}

void causal_conv1d_bwd(
    Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states, Tensor dout, OptionalTensor dfinal_states,
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx, OptionalTensor cu_seqlens,
    OptionalTensor initial_states, bool silu) {
  Exec exec(x);
  conv::causal_conv1d_bwd(
      exec, view(dx), view(dweight), view(dbias), view(dinitial_states), view(dout), view(dfinal_states),
      {view(x), view(weight), view(bias), view(seq_idx), view(cu_seqlens), view(initial_states), silu});
}

void causal_conv1d_update(
    Tensor out, Tensor conv_state, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor cache_seqlens,
    OptionalTensor conv_state_indices, bool silu) {
  Exec exec(x);
  conv::causal_conv1d_update(
      exec, view(out), view(conv_state), view(x), view(weight), view(bias), view(cache_seqlens),
      view(conv_state_indices), silu);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "causal_conv1d_fwd_cuda(Tensor(a!) out, Tensor(b!) final_states, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, bool silu) -> ()");
  m.def(
      "causal_conv1d_bwd_cuda(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor(d!) dinitial_states, "
      "Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
      "Tensor? initial_states, bool silu) -> ()");
  m.def(
      "causal_conv1d_update_cuda(Tensor(a!) out, Tensor(b!) conv_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? cache_seqlens, Tensor? conv_state_indices, bool silu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("causal_conv1d_fwd_cuda", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd_cuda", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update_cuda", TORCH_BOX(&causal_conv1d_update));
}
