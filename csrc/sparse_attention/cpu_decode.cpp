// scalekern_native::sparse_attention_decode_cpu: which keys each head sees and how they are split, then the kernel of
// this machine's ISA.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/tensor.h"
#include "sparse_attention/decode.h"

namespace {

using namespace scalekern;

class Indices {  // a 1-D int32 or int64 tensor
 public:
  explicit Indices(const Tensor& t) : data_(t.data_ptr()), stride_(t.stride(0)), wide_(dtype_of(t) == Dtype::i64) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i * stride_] : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  bool wide_;
};

int64_t page_of(const DecodeArgs& a, int64_t b, int64_t j) {
  const int64_t i = b * a.table_b + j * a.table_j;
  return a.table_is_int64 ? static_cast<const int64_t*>(a.table)[i] : static_cast<const int32_t*>(a.table)[i];
}

void check_pages(const DecodeArgs& a, int64_t b, int64_t from, int64_t to, int64_t pages) {
  for (int64_t j = from / a.page; from < to && j <= (to - 1) / a.page; ++j) {
    const int64_t page = page_of(a, b, j);
    STD_TORCH_CHECK(
        page >= 0 && page < pages, "sparse_attention_decode: block_table[", b, ", ", j, "] must be a page below ",
        pages, ", got ", page);
  }
}

DecodePart part_of(const Tensor& t, bool ragged) {
  const int s = ragged ? 1 : 2;
  return {data(t), stride(t, 0), ragged ? 0 : stride(t, 1), stride(t, s), stride(t, s + 1)};
}

DecodeCache cache_of(
    const Tensor& codes, const OptionalTensor& scales, const OptionalTensor& offsets, bool ragged, int64_t bits,
    int64_t group) {
  DecodeCache cache{};
  cache.codes = part_of(codes, ragged), cache.bits = int(bits), cache.group = group;
  if (scales.has_value()) cache.scales = part_of(*scales, ragged), cache.half_scales = dtype_of(*scales) == Dtype::f16;
  if (offsets.has_value()) cache.offsets = part_of(*offsets, ragged);
  return cache;
}

void sparse_attention_decode(
    Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor lengths, OptionalTensor budgets,
    OptionalTensor head_offsets, OptionalTensor block_table, OptionalTensor starts, OptionalTensor sinks,
    OptionalTensor k_scales, OptionalTensor k_offsets, OptionalTensor v_scales, OptionalTensor v_offsets, int64_t sink,
    bool circular, double scale, double softcap, int64_t k_bits, int64_t k_group, int64_t v_bits, int64_t v_group,
    int64_t value_dim) {
  const bool ragged = head_offsets.has_value(), paged = block_table.has_value();
  const int slots_axis = ragged ? 1 : 2;
  DecodeArgs a{};
  a.batch = q.size(0), a.tokens = q.size(2), a.dim = q.size(3), a.value_dim = value_dim;
  a.key_heads = ragged ? head_offsets->size(0) - 1 : k.size(1);
  a.group = q.size(1) / a.key_heads;
  a.page = paged ? k.size(2) : 0;
  a.sink = sink, a.circular = circular, a.dtype = int(dtype_of(q)), a.scale = scale, a.softcap = softcap;
  a.out = data(out), a.lse = data(lse), a.q = data(q), a.sinks = data(sinks);
  a.table = data(block_table), a.table_is_int64 = paged && dtype_of(*block_table) == Dtype::i64;
  a.q_b = stride(q, 0), a.q_h = stride(q, 1), a.q_t = stride(q, 2), a.q_p = stride(q, 3);
  a.k = cache_of(k, k_scales, k_offsets, ragged, k_bits, k_group);
  a.v = cache_of(v, v_scales, v_offsets, ragged, v_bits, v_group);
  a.sinks_h = stride(sinks, 0);
  if (paged) a.table_b = stride(block_table, 0), a.table_j = stride(block_table, 1);

  std::vector<int64_t> windows, reach(a.key_heads, -1);  // reach: the longest window of a group, -1: all
  for (int64_t h = 0; budgets.has_value() && h < q.size(1); ++h) {
    const int64_t budget = Indices(*budgets)[h];
    STD_TORCH_CHECK(
        budget >= sink, "sparse_attention_decode: budgets must be at least ", sink, ", the sinks, got ", budget);
    windows.push_back(budget - sink);
    reach[h / a.group] = std::max(reach[h / a.group], windows.back());
  }
  a.windows = windows.empty() ? nullptr : windows.data();

  std::vector<DecodeHead> heads(a.batch * a.key_heads);
  std::vector<DecodeSplit> splits;
  const Indices length(lengths);
  for (int64_t i = 0; i < int64_t(heads.size()); ++i) {
    const int64_t b = i / a.key_heads, g = i % a.key_heads;
    DecodeHead& head = heads[i];
    head.length = std::max<int64_t>(length[b], 0);
    head.base = ragged ? Indices(*head_offsets)[g] : 0;
    head.capacity = paged ? block_table->size(1) * a.page : k.size(slots_axis);
    if (starts.has_value()) {
      head.base = Indices(*starts)[b];
      STD_TORCH_CHECK(
          head.base >= 0 && head.base <= head.capacity, "sparse_attention_decode: starts must be from 0 to ",
          head.capacity, ", got ", head.base);
      head.capacity -= head.base;
    }
    if (ragged) head.capacity = Indices(*head_offsets)[g + 1] - head.base;
    STD_TORCH_CHECK(
        !ragged || (head.base >= 0 && head.capacity >= 0 && head.base + head.capacity <= k.size(1)),
        "sparse_attention_decode: head_offsets must rise from 0 to at most ", k.size(1), ", got ", head.base, " and ",
        head.base + head.capacity);
    STD_TORCH_CHECK(
        circular || head.length <= head.capacity, "sparse_attention_decode: lengths must be at most ", head.capacity,
        ", the slots of a head, got ", head.length);
    head.sink = std::min({sink, head.length, head.capacity});
    head.low = head.sink;
    if (circular) head.low = std::max(head.low, head.length - std::max<int64_t>(head.capacity - sink, 0));
    if (reach[g] >= 0) head.low = std::max(head.low, head.length - a.tokens - reach[g] + 1);
    head.low = std::min(head.low, head.length);
    head.count = head.sink + head.length - head.low;
    if (paged) check_pages(a, b, 0, head.sink, k.size(0)), check_pages(a, b, head.low, head.length, k.size(0));
    head.first_split = int64_t(splits.size());
    head.splits = (head.count + kDecodeSplit - 1) / kDecodeSplit;
    for (int64_t s = 0; s < head.splits; ++s) {
      const int64_t first = head.count * s / head.splits;
      splits.push_back({i, first, head.count * (s + 1) / head.splits - first});
    }
  }
  a.heads = heads.data(), a.splits = splits.data(), a.split_count = int64_t(splits.size());
  const int64_t bytes = a.split_count * a.rows() * (2 + a.value_dim) * (a.dtype == int(Dtype::f64) ? 8 : 4);
  const std::unique_ptr<char[]> partials(new char[bytes]);
  a.partials = partials.get();
  SCALEKERN_CALL(sparse_attention_decode, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "sparse_attention_decode_cpu(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k_cache, Tensor v_cache, "
      "Tensor lengths, Tensor? budgets, Tensor? head_offsets, Tensor? block_table, Tensor? starts, Tensor? sinks, "
      "Tensor? k_scales, Tensor? k_offsets, Tensor? v_scales, Tensor? v_offsets, int sink, bool circular, float scale, "
      "float softcap, int k_bits, int k_group, int v_bits, int v_group, int value_dim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("sparse_attention_decode_cpu", TORCH_BOX(&sparse_attention_decode));
}
