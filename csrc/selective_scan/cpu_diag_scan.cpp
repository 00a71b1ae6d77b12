// scalekern_native::diag_scan_{fwd,bwd}_cpu: tensors of any rank to pointers and as few axes as their strides allow,
// then the kernels of this machine's ISA.
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "selective_scan/cpu_sequences.h"
#include "selective_scan/diag_scan.h"

namespace {

using namespace scalekern;

struct Operand {
  DiagScanTensor* to;
  const Tensor* tensor;
  bool state;  // no axis of time; packed: the first axis is the sequences'
};

// Fills the sizes and every operand's strides. `like` is what the recurrence writes: it orders the axes.
void lay_out(
    DiagScanArgs& args, const Tensor& like, const std::vector<Operand>& operands, bool packed, bool backwards) {
  const int time = int(like.dim()) - 1;
  args.length = like.size(time), args.io = int(dtype_of(like));
  std::vector<int> axes;  // those that have more than one element; a batch of packed sequences has one
  for (int i = 0; i < time; ++i)
    if (like.size(i) != 1) axes.push_back(i);
  std::stable_sort(axes.begin(), axes.end(), [&](int i, int j) { return like.stride(i) > like.stride(j); });
  const auto merges = [&](int outer, int inner) {
    return std::all_of(operands.begin(), operands.end(), [&](const Operand& o) {
      return !o.tensor || o.tensor->stride(outer) == o.tensor->stride(inner) * like.size(inner);
    });
  };
  // The innermost axis with all that continues it in every tensor is the lanes'; the rest is merged likewise.
  std::vector<std::pair<int, int64_t>> merged;  // (its innermost axis, size), outermost first
  for (size_t i = axes.size(); i-- > 0;) {
    if (!merged.empty() && merges(axes[i], axes[i + 1])) merged.front().second *= like.size(axes[i]);
    else merged.insert(merged.begin(), {axes[i], like.size(axes[i])});
  }
  const bool any = !merged.empty();
  args.lanes = any ? merged.back().second : 1, args.axes = any ? int(merged.size()) - 1 : 0, args.rows = 1;
  for (int k = 0; k < args.axes; ++k) args.size[k] = merged[k].second, args.rows *= merged[k].second;
  for (const Operand& o : operands) {
    if (!o.tensor) continue;
    const Tensor& t = *o.tensor;
    const int64_t count = o.state ? (packed ? t.size(0) : 1) : args.length;
    o.to->time = !o.state ? t.stride(time) : packed ? t.stride(0) : 0;
    o.to->data = static_cast<char*>(data(t));
    if (backwards && count > 0) {
      o.to->data += (count - 1) * o.to->time * int64_t(t.element_size());
      o.to->time = -o.to->time;
    }
    o.to->lane = any ? t.stride(merged.back().first) : 0;
    for (int k = 0; k < args.axes; ++k) o.to->axis[k] = t.stride(merged[k].first);
  }
}

const Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

void diag_scan_fwd(
    Tensor out, Tensor last, Tensor a, Tensor b, OptionalTensor initial, OptionalTensor cu_seqlens, bool reverse) {
  DiagScanArgs args{};
  const auto starts = sequence_starts(cu_seqlens, out.size(out.dim() - 1), reverse);
  args.sequences = int64_t(starts.size()) - 1, args.starts = starts.data();
  expect_writes(out);
  lay_out(args, out, {{&args.y, &out, false}, {&args.a, &a, false}, {&args.x, &b, false}, {&args.after, &last, true},
                      {&args.before, pointer(initial), true}}, cu_seqlens.has_value(), reverse);
  SCALEKERN_CALL(diag_scan_fwd, (args));
}

void diag_scan_bwd(
    Tensor da, Tensor db, Tensor dinitial, Tensor dout, OptionalTensor dlast, Tensor a, Tensor out,
    OptionalTensor initial, OptionalTensor cu_seqlens, bool reverse) {
  DiagScanArgs args{};
  const auto starts = sequence_starts(cu_seqlens, out.size(out.dim() - 1), !reverse);
  args.sequences = int64_t(starts.size()) - 1, args.starts = starts.data();
  expect_writes(da), expect_writes(db);
  lay_out(args, db, {{&args.y, &db, false}, {&args.da, &da, false}, {&args.a, &a, false}, {&args.x, &dout, false},
                     {&args.h, &out, false}, {&args.before, pointer(dlast), true},
                     {&args.after, initial.has_value() ? &dinitial : nullptr, true},
                     {&args.initial, pointer(initial), true}}, cu_seqlens.has_value(), !reverse);
  SCALEKERN_CALL(diag_scan_bwd, (args));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "diag_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) last_state, Tensor a, Tensor b, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool reverse) -> ()");
  m.def(
      "diag_scan_bwd_cpu(Tensor(a!) da, Tensor(b!) db, Tensor(c!) dinitial_state, Tensor dout, Tensor? dlast_state, "
      "Tensor a, Tensor out, Tensor? initial_state, Tensor? cu_seqlens, bool reverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("diag_scan_fwd_cpu", TORCH_BOX(&diag_scan_fwd));
  m.impl("diag_scan_bwd_cpu", TORCH_BOX(&diag_scan_bwd));
}
