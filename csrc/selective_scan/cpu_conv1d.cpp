// scalekern_native::causal_conv1d_{fwd,bwd,update}_cpu: tensors to pointers and strides, rows to runs and tiles, then
// the kernel of this machine's ISA.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/tensor.h"
#include "selective_scan/conv1d.h"

namespace {

using namespace scalekern;

// Fewer elements than this take under 20 us on one thread, which is what waking the others may cost.
constexpr int64_t kParallelElements = 16384;
// Runs shorter than this on average would leave most lanes empty if they lay along time.
constexpr int64_t kShortRun = 16;

ConvTensor view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
ConvTensor view(const OptionalTensor& t) { return t.has_value() ? view(*t) : ConvTensor{}; }
ConvTensor view_filter(const Tensor& t) { return {t.data_ptr(), 0, t.stride(0), t.stride(1)}; }
ConvTensor view_bias(const Tensor& t) { return {t.data_ptr(), 0, t.stride(0), 0}; }

// One row of an int32 or int64 tensor.
struct Integers {
  const void* base;
  int64_t stride;
  bool wide;
  Integers(const Tensor& t, int64_t row = 0)
      : stride(t.stride(t.dim() - 1)), wide(dtype_of(t) == Dtype::i64) {
    const int64_t offset = t.dim() == 2 ? row * t.stride(0) : 0;
    base = static_cast<const char*>(t.data_ptr()) + offset * (wide ? 8 : 4);
  }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(base)[i * stride] : static_cast<const int32_t*>(base)[i * stride];
  }
};

// The work list of one call; `args` points into it.
struct Plan {
  std::vector<ConvRun> runs;
  std::vector<ConvPiece> pieces;
  std::vector<int64_t> groups;
  ConvArgs args{};
};

void find_runs(
    Plan& plan, const Tensor& x, const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool initial) {
  const int64_t batch = x.size(0), length = x.size(2);
  if (cu_seqlens.has_value()) {
    const Integers bounds(*cu_seqlens);
    const int64_t count = cu_seqlens->size(0) - 1;
    int64_t begin = bounds[0];
    STD_TORCH_CHECK(begin == 0, "causal_conv1d: cu_seqlens must begin with 0, got ", begin);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t end = bounds[s + 1];
      STD_TORCH_CHECK(begin <= end && end <= length, "causal_conv1d: cu_seqlens must rise from 0 to ", length);
      plan.runs.push_back({0, begin, end, initial ? s : -1, s, false});
      begin = end;
    }
    STD_TORCH_CHECK(begin == length, "causal_conv1d: cu_seqlens must end with ", length, ", got ", begin);
    return;
  }
  for (int64_t row = 0; row < batch; ++row) {
    if (!seq_idx.has_value()) {
      plan.runs.push_back({row, 0, length, initial ? row : -1, row, false});
      continue;
    }
    const Integers ids(*seq_idx, row);
    for (int64_t begin = 0, end; begin < length; begin = end) {
      const int64_t id = ids[begin];
      for (end = begin + 1; end < length && ids[end] == id;) ++end;
      plan.runs.push_back({row, begin, end, initial && begin == 0 ? row : -1, end == length ? row : -1, id < 0});
    }
  }
}

// Runs to tiles, tiles to groups of about `group_size` tokens of one row.
void cut(Plan& plan, int64_t tile, int64_t group_size) {
  int64_t row = -1, group = -1;
  for (int64_t r = 0; r < int64_t(plan.runs.size()); ++r) {
    const ConvRun& run = plan.runs[r];
    for (int64_t begin = run.begin; begin < run.end; begin += tile) {
      if (run.row != row || begin / group_size != group) plan.groups.push_back(plan.pieces.size());
      row = run.row, group = begin / group_size;
      plan.pieces.push_back({r, begin, std::min(begin + tile, run.end)});
    }
  }
  plan.groups.push_back(plan.pieces.size());
}

Plan make_plan(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, const OptionalTensor& initial, bool silu, const Tensor* out) {
  Plan plan;
  ConvArgs& a = plan.args;
  find_runs(plan, x, seq_idx, cu_seqlens, initial.has_value());
  const int64_t tokens = x.size(0) * x.size(2);
  a.channels = x.size(1), a.width = weight.size(1), a.dtype = int(dtype_of(x)), a.silu = silu;
  a.along_time = x.stride(2) <= x.stride(1) && tokens >= kShortRun * int64_t(plan.runs.size());
  a.parallel = tokens * a.channels >= kParallelElements;
  // A forward line along time needs no tile in L1 but for its first tokens, and sums nothing.
  const bool line = out && a.along_time && x.stride(2) == 1 && out->stride(2) == 1;
  if (line) cut(plan, kConvLine, kConvLine);
  else cut(plan, a.along_time ? kConvTimeTile : kConvBlockTile, kConvGroup);
  a.runs = plan.runs.data(), a.run_count = plan.runs.size();
  a.pieces = plan.pieces.data(), a.groups = plan.groups.data(), a.group_count = plan.groups.size() - 1;
  a.x = view(x), a.initial = view(initial), a.weight = view_filter(weight);
  if (bias.has_value()) a.bias = view_bias(*bias);
  return plan;
}

void causal_conv1d_fwd(
    Tensor out, Tensor final_states, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx,
    OptionalTensor cu_seqlens, OptionalTensor initial_states, bool silu) {
  Plan plan = make_plan(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu, &out);
  expect_writes(out);
  plan.args.out = view(out), plan.args.final = view(final_states);
  SCALEKERN_CALL(conv1d_fwd, (plan.args));
}

void causal_conv1d_bwd(
    Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial, Tensor dout, OptionalTensor dfinal, Tensor x,
    Tensor weight, OptionalTensor bias, OptionalTensor seq_idx, OptionalTensor cu_seqlens,
    OptionalTensor initial_states, bool silu) {
  Plan plan = make_plan(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu, nullptr);
  ConvArgs& a = plan.args;
  expect_writes(dx);
  a.dx = view(dx), a.dweight = view_filter(dweight), a.dout = view(dout), a.dfinal = view(dfinal);
  if (bias.has_value()) a.dbias = view_bias(dbias);
  if (initial_states.has_value()) a.dinitial = view(dinitial);
  const size_t real = dtype_of(x) == Dtype::f64 ? sizeof(double) : sizeof(float);
  std::unique_ptr<char[]> partials(new char[a.group_count * a.channels * (a.width + 1) * real]);
  a.partials = partials.get();
  SCALEKERN_CALL(conv1d_bwd, (a));
}

void causal_conv1d_update(
    Tensor out, Tensor conv_state, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor cache_seqlens,
    OptionalTensor indices, bool silu) {
  ConvUpdateArgs a{};
  a.batch = x.size(0), a.channels = x.size(1), a.steps = x.size(2);
  a.width = weight.size(1), a.window = conv_state.size(2);
  a.dtype = int(dtype_of(x)), a.state_dtype = int(dtype_of(conv_state)), a.silu = silu;
  a.x = view(x), a.out = view(out), a.state = view(conv_state), a.weight = view_filter(weight);
  if (bias.has_value()) a.bias = view_bias(*bias);
  a.slots = data(indices), a.slots_b = stride(indices, 0);
  a.slots_are_int64 = indices.has_value() && dtype_of(*indices) == Dtype::i64;
  a.seen = data(cache_seqlens), a.seen_b = stride(cache_seqlens, 0);
  a.seen_are_int64 = cache_seqlens.has_value() && dtype_of(*cache_seqlens) == Dtype::i64;
  for (int64_t b = 0; indices.has_value() && b < a.batch; ++b) {
    const int64_t slot = Integers(*indices)[b];
    STD_TORCH_CHECK(
        slot < conv_state.size(0), "causal_conv1d_update: conv_state_indices must be below ", conv_state.size(0),
        ", got ", slot);
  }
  SCALEKERN_CALL(conv1d_update, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "causal_conv1d_fwd_cpu(Tensor(a!) out, Tensor(b!) final_states, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? seq_idx, Tensor? cu_seqlens, Tensor? initial_states, bool silu) -> ()");
  m.def(
      "causal_conv1d_bwd_cpu(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor(d!) dinitial_states, "
      "Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
      "Tensor? initial_states, bool silu) -> ()");
  m.def(
      "causal_conv1d_update_cpu(Tensor(a!) out, Tensor(b!) conv_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? cache_seqlens, Tensor? conv_state_indices, bool silu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("causal_conv1d_fwd_cpu", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd_cpu", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update_cpu", TORCH_BOX(&causal_conv1d_update));
}
