// scalekern_native::selective_scan_{fwd,bwd}_cpu: tensors to pointers and strides in scan order, then the kernels of
// this machine's ISA.
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "selective_scan/cpu_sequences.h"
#include "selective_scan/scan.h"

namespace {

using namespace scalekern;

ScanTensor scan_view(const Tensor& t, int reversed_dim = -1) {
  ScanTensor v{static_cast<char*>(data(t)), {}, nullptr, 0, 1, 0};
  for (int i = 0; i < std::min<int>(t.dim(), 4); ++i) v.s[i] = stride(t, i);
  if (reversed_dim >= 0 && t.size(reversed_dim) > 0) {
    v.data += (t.size(reversed_dim) - 1) * v.s[reversed_dim] * int64_t(t.element_size());
    v.s[reversed_dim] = -v.s[reversed_dim];
  }
  return v;
}

ScanTensor scan_view(const OptionalTensor& t, int reversed_dim = -1) {
  return t.has_value() ? scan_view(*t, reversed_dim) : ScanTensor{};
}

// A tensor over time, which is axis `time`, or that and the next one: an image, read line by line.
ScanTensor time_view(const Tensor& t, int time, bool reverse) {
  ScanTensor v = scan_view(t, reverse ? time : -1);
  const int64_t length = t.size(time), inner = time + 1 < t.dim() ? t.size(time + 1) : 1;
  v.line = length * inner;
  if (inner == 1 || v.line == 0) return v;
  int64_t step = stride(t, time + 1);
  if (reverse) v.data += (inner - 1) * step * int64_t(t.element_size()), step = -step;
  v.line_s = v.s[time], v.s[time] = step;
  if (length > 1 && v.line_s != inner * step) v.line = inner;
  return v;
}

ScanTensor time_view(const OptionalTensor& t, int time, bool reverse) {
  return t.has_value() ? time_view(*t, time, reverse) : ScanTensor{};
}

ScanTensor matrix_view(const Tensor& t, bool reverse) { return t.dim() == 2 ? scan_view(t) : time_view(t, 3, reverse); }

int64_t length_of(const Tensor& u) { return u.dim() == 4 ? u.size(2) * u.size(3) : u.size(2); }

int64_t checkpoint_stride(int64_t states) {  // python/scalekern/_packing.py
  int64_t stride = 64;
  while (stride < 2 * states) stride *= 2;
  return stride;
}

// What forward and backward share: everything but the outputs.
ScanArgs arguments(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& bias, const OptionalTensor& initial,
    const std::vector<int64_t>& starts, const Tensor& checkpoints, bool softplus, bool reverse) {
  ScanArgs a{};
  a.batch = u.size(0), a.channels = u.size(1), a.states = A.size(1);
  a.u = time_view(u, 2, reverse), a.length = length_of(u);
  a.groups_B = B.dim() == 2 ? 0 : B.size(1), a.groups_C = C.dim() == 2 ? 0 : C.size(1);
  a.sequences = int64_t(starts.size()) - 1, a.starts = starts.data();
  a.chunk = checkpoint_stride(a.states), a.slots = checkpoints.size(1);
  const int64_t chunks = (a.length + a.chunk - 1) / a.chunk;
  a.pad = reverse ? chunks * a.chunk - a.length : 0;
  a.io = int(dtype_of(delta)), a.complex_A = dtype_of(A) == Dtype::c64 || dtype_of(A) == Dtype::c128,
  a.softplus = softplus;
  const int row = reverse && a.batch == 1 ? 0 : -1;
  a.delta = time_view(delta, 2, reverse), a.z = time_view(z, 2, reverse), a.A = scan_view(A);
  a.B = matrix_view(B, reverse), a.C = matrix_view(C, reverse);
  a.D = scan_view(D), a.bias = scan_view(bias), a.initial = scan_view(initial, row);
  a.checkpoints = scan_view(checkpoints, reverse ? 1 : -1);
  return a;
}

Tensor allocate_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

void run_fwd(ScanArgs& a, const Tensor& out, const Tensor& last_state, bool reverse) {
  expect_writes(out);
  a.out = time_view(out, 2, reverse);
  a.last = scan_view(last_state, reverse && a.batch == 1 ? 0 : -1);
  const Tensor workspace = allocate_workspace(out, SCALEKERN_CALL(selective_scan_fwd_workspace, (a)));
  a.workspace = static_cast<char*>(data(workspace));
  SCALEKERN_CALL(selective_scan_fwd, (a));
}

void selective_scan_fwd(
    Tensor out, Tensor last_state, Tensor checkpoints, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
    OptionalTensor D, OptionalTensor z, OptionalTensor bias, OptionalTensor initial, OptionalTensor cu_seqlens,
    bool softplus, bool reverse, bool save_checkpoints) {
  const auto starts = sequence_starts(cu_seqlens, length_of(u), reverse);
  ScanArgs a = arguments(u, delta, A, B, C, D, z, bias, initial, starts, checkpoints, softplus, reverse);
  run_fwd(a, out, last_state, reverse);
}

void quantized_selective_scan_fwd(
    Tensor out, Tensor last_state, Tensor checkpoints, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
    Tensor u_scale, Tensor B_scale, Tensor C_scale, OptionalTensor D, OptionalTensor z, OptionalTensor bias,
    OptionalTensor initial, OptionalTensor cu_seqlens, bool softplus, bool reverse, bool save_checkpoints) {
  const auto starts = sequence_starts(cu_seqlens, u.size(2), reverse);
  ScanArgs a = arguments(u, delta, A, B, C, D, z, bias, initial, starts, checkpoints, softplus, reverse);
  const auto add_steps = [](ScanTensor& x, const Tensor& steps) {
    x.scale = static_cast<const char*>(data(steps)), x.scale_s = stride(steps, 0);
  };
  add_steps(a.u, u_scale), add_steps(a.B, B_scale), add_steps(a.C, C_scale);
  run_fwd(a, out, last_state, reverse);
}

void selective_scan_bwd(
    Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor dbias, Tensor dinitial,
    Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor bias, OptionalTensor initial, OptionalTensor cu_seqlens, Tensor checkpoints,
    bool softplus, bool reverse) {
  const auto starts = sequence_starts(cu_seqlens, length_of(u), reverse);
  ScanArgs a = arguments(u, delta, A, B, C, D, z, bias, initial, starts, checkpoints, softplus, reverse);
  const int row = reverse && a.batch == 1 ? 0 : -1;
  expect_writes(du), expect_writes(ddelta);
  a.dout = time_view(dout, 2, reverse), a.du = time_view(du, 2, reverse), a.ddelta = time_view(ddelta, 2, reverse);
  a.dA = scan_view(dA), a.dB = matrix_view(dB, reverse), a.dC = matrix_view(dC, reverse);
  a.dlast = scan_view(dlast_state, row);
  if (D.has_value()) a.dD = scan_view(dD);
  if (z.has_value()) expect_writes(dz), a.dz = time_view(dz, 2, reverse);
  if (bias.has_value()) a.dbias = scan_view(dbias);
  if (initial.has_value()) a.dinitial = scan_view(dinitial, row);
  const Tensor workspace = allocate_workspace(u, SCALEKERN_CALL(selective_scan_bwd_workspace, (a)));
  a.workspace = static_cast<char*>(data(workspace));
  SCALEKERN_CALL(selective_scan_bwd, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "selective_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) last_state, Tensor(c!) checkpoints, Tensor u, Tensor delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool delta_softplus, bool reverse, bool save_checkpoints) -> ()");
  m.def(
      "quantized_selective_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) last_state, Tensor(c!) checkpoints, Tensor u, "
      "Tensor delta, Tensor A, Tensor B, Tensor C, Tensor u_scale, Tensor B_scale, Tensor C_scale, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool reverse, "
      "bool save_checkpoints) -> ()");
  m.def(
      "selective_scan_bwd_cpu(Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, "
      "Tensor(f!) dD, Tensor(g!) dz, Tensor(h!) ddelta_bias, Tensor(i!) dinitial_state, Tensor dout, "
      "Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, bool delta_softplus, "
      "bool reverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("selective_scan_fwd_cpu", TORCH_BOX(&selective_scan_fwd));
  m.impl("quantized_selective_scan_fwd_cpu", TORCH_BOX(&quantized_selective_scan_fwd));
  m.impl("selective_scan_bwd_cpu", TORCH_BOX(&selective_scan_bwd));
}
