// scalekern_native::sparse_attention_{fwd,bwd}_cpu and mask_bits_cpu: tensors to pointers and strides, the backward's
// query tiles to splits, then the kernel of this machine's ISA.
#include <algorithm>
#include <vector>

#include "common/amx.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "common/view.h"
#include "sparse_attention/attention.h"
#include "sparse_attention/query_tile.h"

namespace {

using namespace scalekern;

// The backward is cut into about this many items, whatever the number of threads: its sums do not depend on that.
constexpr int64_t kItems = 32;
constexpr int64_t kSplitTiles = 4;                   // tiles of queries that are worth a split of their own
constexpr int64_t kPartialBytes = int64_t(1) << 28;  // of partial sums

AttnTensor view(const Tensor& t) {
  AttnTensor v{t.data_ptr(), {}};
  for (int64_t i = 0; i < t.dim(); ++i) v.s[i] = t.size(i) == 1 ? 0 : t.stride(i);
  return v;
}
AttnTensor view(const OptionalTensor& t) { return t.has_value() ? view(*t) : AttnTensor{}; }

// Blocks that the programs of a mask stack up at most.
int64_t mask_depth(const int32_t* code) {
  int64_t deepest = 1;
  for (int32_t h = 0; h < code[0]; ++h) {
    const int32_t* program = code + code[2 + h];
    int64_t depth = 0;
    for (int32_t i = 0; i < program[0]; ++i) {
      const int32_t op = program[2 + 12 * i];
      depth += op < 16 ? 1 : op < 18 ? -1 : 0;
      deepest = std::max(deepest, depth);
    }
  }
  return deepest;
}

// position_table, q_pos, k_pos, time_table, q_time, k_time, edges
void set_tables(
    AttnArgs& a, const OptionalTensor& position, const OptionalTensor& q_pos, const OptionalTensor& k_pos,
    const OptionalTensor& time, const OptionalTensor& q_time, const OptionalTensor& k_time,
    const OptionalTensor& edges) {
  a.position = view(position), a.q_pos = view(q_pos), a.k_pos = view(k_pos);
  a.time = view(time), a.q_time = view(q_time), a.k_time = view(k_time), a.edges = view(edges);
  if (position.has_value()) a.position_heads = position->size(0), a.positions = position->size(1);
  if (time.has_value()) a.time_heads = time->size(0), a.edge_count = edges->size(0);
}

AttnArgs arguments(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& code, const OptionalTensor& ptr,
    const OptionalTensor& runs, int64_t block_q, int64_t block_k, const OptionalTensor& bias,
    const OptionalTensor& sinks, double scale, double softcap, bool silu, double norm) {
  AttnArgs a{};
  a.batch = q.size(0), a.heads = q.size(1), a.q_len = q.size(2), a.dim = q.size(3);
  a.kv_heads = k.size(1), a.kv_len = k.size(2), a.value_dim = v.size(3);
  a.code = static_cast<const int32_t*>(data(code)), a.mask_depth = mask_depth(a.code);
  a.plan_heads = a.code[0], a.plan_batches = a.code[1], a.block_q = block_q, a.block_k = block_k;
  a.ptr = static_cast<const int32_t*>(data(ptr)), a.runs = static_cast<const int32_t*>(data(runs));
  const int64_t lists = a.plan_heads * a.plan_batches * ceil_div(a.q_len, block_q);
  STD_TORCH_CHECK(
      ptr.has_value() ? ptr->size(0) == lists + 1 : a.q_len <= block_q && block_q == kMaskBlock && block_k == kKeyTile,
      "sparse_attention: expected a plan of ", lists, " lists, or at most 64 queries");
  a.dtype = int(dtype_of(q)), a.wide_lse = dtype_of(q) == Dtype::f64;
  if (bias.has_value()) a.bias_dtype = int(dtype_of(*bias));
  a.silu = silu, a.scale = scale, a.softcap = softcap, a.norm = norm;
  a.q = view(q), a.k = view(k), a.v = view(v), a.bias = view(bias);
  a.sinks = data(sinks), a.sinks_stride = stride(sinks, 0);
  return a;
}

// Up to how many queries a kernel of their own is faster than panels, of whose one vector of lanes most are empty then.
// Sapphire Rapids, it and panels in times of scaled_dot_product_attention: float32, 8 heads of 4,096 keys, P 128, 9
// queries 0.95 1.22, 10 0.90 1.14, 12 1.02 1.06; 4 heads of 1,024, P 64, 9 1.31 1.22, 12 1.44 1.08; bfloat16, whose
// panels go through tile registers, 32 heads of 8,192, P 64, 5 queries 1.08 0.79. The baseline would convert halves one
// by one.
int64_t few_queries(const AttnArgs& a) {
  const bool halves = a.dtype == int(Dtype::bf16) || a.dtype == int(Dtype::f16);
  if (a.dtype == int(Dtype::bf16) && has_amx()) return 4;
  if (halves && isa() == Isa::baseline) return 0;
  const int64_t bytes = isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16;
  return bytes / (a.wide_lse ? 8 : 4) * 5 / 8;
}

// Few queries: groups of heads that share keys, about kGroupRows rows each, and their keys in pieces. By the mask and
// the lengths alone: sums are the same for any number of threads.
struct FewQueries {
  std::vector<int32_t> tiles;
  std::vector<AttnHeads> groups;
  std::vector<AttnPiece> pieces;

  FewQueries(AttnArgs& a, const QueryTile& tile) {
    constexpr int64_t kGroupRows = 64;
    const int64_t group = a.heads / a.kv_heads, together = std::clamp<int64_t>(kGroupRows / a.q_len, 1, group);
    int64_t first = 0, batch = -1, rows = 0;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0, heads; h < a.heads; h += heads) {
        heads = std::min(together, group - h % group);
        const int64_t bm = a.plan_batches == 1 ? 0 : b;
        if (a.plan_heads > 1 || bm != batch) {  // else it sees what the heads before do
          first = int64_t(tiles.size()), batch = bm;
          const int64_t lists = a.plan_heads == 1 ? 1 : heads, list = bm * a.plan_heads + (a.plan_heads == 1 ? 0 : h);
          const uint64_t* words = tile.words.data() + list * a.q_len * tile.tiles;
          for (int64_t t = 0; t < tile.tiles; ++t) {
            uint64_t some = 0;
            for (int64_t r = 0; r < lists * a.q_len; ++r) some |= words[r * tile.tiles + t];
            if (some) tiles.push_back(int32_t(t));
          }
        }
        const int64_t seen = int64_t(tiles.size()) - first, count = ceil_div(seen, kPieceTiles);
        const int64_t number = int64_t(groups.size());
        groups.push_back({b, h, heads, int64_t(pieces.size()), count});
        for (int64_t s = 0; s < count; ++s, rows += heads * a.q_len) {
          const int64_t begin = seen * s / count;
          pieces.push_back({number, first + begin, seen * (s + 1) / count - begin, rows});
        }
      }
    a.bits = tile.words.data(), a.key_tiles = tile.tiles, a.tiles = tiles.data();
    a.groups = groups.data(), a.group_count = int64_t(groups.size());
    a.pieces = pieces.data(), a.piece_count = int64_t(pieces.size()), a.partial_count = rows;
  }
};

// Query heads that share keys, of which every query sees the same, as rows of one head, if that leaves work for all
// threads: panels are full (32 heads of 8 key heads, 4,096 keys, P 128: bfloat16, 8 to 16 queries, in a quarter to 0.4
// of the time, float32, 16 queries, in 0.6). Not a bit depends on it: a query is a lane.
void fold_heads(AttnArgs& a, QueryTile& tile) {
  const int64_t group = a.heads / a.kv_heads;
  const auto rows = [&](const AttnTensor& t) { return t.s[1] == a.q_len * t.s[2]; };
  if (group == 1 || a.batch * a.kv_heads < num_threads() || a.plan_heads * a.plan_batches > 1) return;
  if (a.bias || a.position || a.time || a.sinks) return;
  if (!rows(a.q) || !rows(a.out) || !rows(a.lse)) return;
  const int32_t count = tile.ptr[1];
  for (int32_t r = 0; r < count; ++r)
    if (tile.runs[3 * r + 2] != 0) return;
  for (AttnTensor* t : {&a.q, &a.out, &a.lse}) t->s[1] *= group;
  a.heads = a.kv_heads, a.q_len *= group;
  const std::vector<int32_t> once = tile.runs;
  for (int64_t i = 1; i < ceil_div(a.q_len, a.block_q); ++i) {
    tile.ptr.push_back(count * int32_t(i + 1));
    tile.runs.insert(tile.runs.end(), once.begin(), once.end());
  }
}

void run_fwd(AttnArgs& a, const Tensor& out, const Tensor& lse) {
  expect_writes(out);
  a.out = view(out), a.lse = view(lse);
  if (a.ptr) return SCALEKERN_CALL(attention_fwd, (a));
  const bool few = a.q_len <= few_queries(a) && !a.silu && !a.time;
  QueryTile tile(a.code, a.mask_depth, a.q_len, a.kv_len, few);
  if (!few) fold_heads(a, tile);
  a.ptr = tile.ptr.data(), a.runs = tile.runs.data();
  if (!few) return SCALEKERN_CALL(attention_fwd, (a));
  const FewQueries plan(a, tile);
  SCALEKERN_CALL(attention_few, (a));
}

void attention_fwd(
    Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor code, OptionalTensor ptr, OptionalTensor runs,
    int64_t block_q, int64_t block_k, OptionalTensor bias, OptionalTensor sinks, OptionalTensor position_table,
    OptionalTensor q_pos, OptionalTensor k_pos, OptionalTensor time_table,
    OptionalTensor q_time, OptionalTensor k_time, OptionalTensor edges, double scale, double softcap, bool silu,
    double norm) {
  AttnArgs a = arguments(q, k, v, code, ptr, runs, block_q, block_k, bias, sinks, scale, softcap, silu, norm);
  set_tables(a, position_table, q_pos, k_pos, time_table, q_time, k_time, edges);
  run_fwd(a, out, lse);
}

// Without options, and with outputs that are made here: 15 more arguments take 5 us, two outputs made in Python 4.
std::tuple<Tensor, Tensor> attention_plain(
    Tensor q, Tensor k, Tensor v, Tensor code, OptionalTensor ptr, OptionalTensor runs, int64_t block_q,
    int64_t block_k, double scale) {
  AttnArgs a = arguments(q, k, v, code, ptr, runs, block_q, block_k, {}, {}, scale, 0, false, 1);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.heads, a.q_len, a.value_dim});
  Tensor lse = torch::stable::new_empty(
      q, {a.batch, a.heads, a.q_len},
      a.wide_lse ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  run_fwd(a, out, lse);
  return {out, lse};
}

// Query tiles [0, n) in parts of about equal work, and where each adds up the gradients of the keys that it touches.
struct Splits {
  std::vector<AttnSplit> parts;
  std::vector<int32_t> slots;
  int64_t slot_count = 0;

  // in_place: a tile of keys that one split alone touches needs no slot.
  Splits(const AttnArgs& a, int64_t count, bool in_place) {
    const int64_t n = ceil_div(a.q_len, a.block_q), lists = a.plan_heads * a.plan_batches;
    const int64_t tiles = ceil_div(a.kv_len, a.block_k);
    const auto runs = [&](int64_t i, const auto& body) {
      for (int64_t list = 0; list < lists; ++list)
        for (int32_t r = a.ptr[list * n + i]; r < a.ptr[list * n + i + 1]; ++r) body(a.runs[3 * r], a.runs[3 * r + 1]);
    };
    std::vector<int64_t> before(n + 1, 0);  // tiles of all earlier lists
    for (int64_t i = 0; i < n; ++i) {
      before[i + 1] = before[i] + 1;
      runs(i, [&](int32_t, int32_t length) { before[i + 1] += length; });
    }
    int64_t begin = 0;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t bound = before[n] * (s + 1) / count;
      const int64_t end = std::upper_bound(before.begin(), before.end(), bound) - before.begin() - 1;
      if (end > begin) parts.push_back({begin, end}), begin = end;
    }
    slots.assign(parts.size() * tiles, kNoSlot);
    for (size_t s = 0; s < parts.size(); ++s)
      for (int64_t i = parts[s].begin; i < parts[s].end; ++i)
        runs(i, [&](int32_t first, int32_t length) { std::fill_n(&slots[s * tiles + first], length, kInPlace); });
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t touching = 0;
      for (size_t s = 0; s < parts.size(); ++s) touching += slots[s * tiles + t] == kInPlace;
      if (touching == 0) slots[t] = kInPlace;  // split 0 clears it
      if (touching <= 1 && in_place) continue;
      for (size_t s = 0; s < parts.size(); ++s)
        if (int32_t& slot = slots[s * tiles + t]; slot == kInPlace) slot = int32_t(slot_count++);
    }
  }
};

void attention_bwd(
    Tensor dq, Tensor dk, Tensor dv, OptionalTensor dbias, OptionalTensor dsinks, OptionalTensor dposition_table,
    OptionalTensor dtime_table, Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k,
    Tensor v, Tensor code, OptionalTensor ptr, OptionalTensor runs, int64_t block_q, int64_t block_k,
    OptionalTensor bias, OptionalTensor sinks, OptionalTensor position_table, OptionalTensor q_pos,
    OptionalTensor k_pos, OptionalTensor time_table, OptionalTensor q_time, OptionalTensor k_time,
    OptionalTensor edges, double scale, double softcap, bool silu, double norm) {
  AttnArgs a = arguments(q, k, v, code, ptr, runs, block_q, block_k, bias, sinks, scale, softcap, silu, norm);
  set_tables(a, position_table, q_pos, k_pos, time_table, q_time, k_time, edges);
  std::optional<QueryTile> tile;
  if (!ptr.has_value()) {
    tile.emplace(a.code, a.mask_depth, a.q_len, a.kv_len, false);
    a.ptr = tile->ptr.data(), a.runs = tile->runs.data();
  }
  expect_writes(dq), expect_writes(dk), expect_writes(dv);
  a.out = view(out), a.lse = view(lse), a.dout = view(dout), a.dlse = view(dlse);
  a.dq = view(dq), a.dk = view(dk), a.dv = view(dv), a.dbias = view(dbias);
  a.dposition = view(dposition_table), a.dtime = view(dtime_table);
  if (sinks.has_value()) a.dsinks = data(dsinks), a.dsinks_stride = stride(dsinks, 0);
  const bool shared = dbias.has_value() && dbias->size(0) == 1;
  a.batch_groups = shared ? 1 : a.batch;
  a.bias_heads = dbias.has_value() ? dbias->size(1) : 1;
  a.head_groups = dbias.has_value() && a.bias_heads == 1 ? 1 : a.kv_heads;
  const int64_t tiles = ceil_div(a.q_len, block_q), real = a.wide_lse ? 8 : 4;
  int64_t count = std::max<int64_t>(
      1, std::min(ceil_div(kItems, a.batch_groups * a.head_groups), tiles / kSplitTiles));
  // Sums are floats (doubles), in rows of whole panels (of every level).
  const bool in_place = q.element_size() == size_t(real) && a.dim % 32 == 0 && a.value_dim % 32 == 0 &&
                        a.dk.s[3] == 1 && a.dv.s[3] == 1;
  Splits splits(a, count, in_place);
  const int64_t widths = round_up(a.dim, 64) + round_up(a.value_dim, 64);
  const int64_t slot_bytes = a.batch * a.kv_heads * a.block_k * widths * real;
  while (splits.parts.size() > 1 && splits.slot_count * slot_bytes > kPartialBytes)
    splits = Splits(a, count /= 2, in_place);
  const int64_t wanted = ceil_div(kItems, int64_t(splits.parts.size()) * a.head_groups);
  if (a.dposition || a.dtime) a.batch_groups = std::min(a.batch_groups, std::max<int64_t>(1, wanted));
  if (shared) {
    const int64_t most = kPartialBytes / 4 / (a.bias_heads * a.q_len * a.kv_len * real);
    a.batch_groups = std::max<int64_t>(1, std::min({wanted, a.batch, most}));
    a.partial_dbias = a.batch_groups > 1;
  }
  if (dbias.has_value() && !a.partial_dbias) torch::stable::zero_(*dbias);
  a.splits = splits.parts.data(), a.slots = splits.slots.data();
  a.split_count = int64_t(splits.parts.size()), a.slot_count = splits.slot_count;
  SCALEKERN_CALL(attention_bwd, (a));
}

void mask_bits(Tensor out, Tensor code) {
  AttnArgs a{};
  a.batch = out.size(0), a.heads = out.size(1), a.q_len = out.size(2), a.kv_len = out.size(3);
  a.code = static_cast<const int32_t*>(data(code)), a.mask_depth = mask_depth(a.code);
  SCALEKERN_CALL(attention_mask, (a, static_cast<bool*>(data(out))));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "sparse_attention_fwd_cpu(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor code, "
      "Tensor? ptr, Tensor? runs, int block_q, int block_k, Tensor? bias, Tensor? sinks, Tensor? position_table, "
      "Tensor? q_pos, Tensor? k_pos, Tensor? time_table, Tensor? q_time, Tensor? k_time, Tensor? edges, float scale, "
      "float softcap, bool silu, float norm) -> ()");
  m.def(
      "sparse_attention_bwd_cpu(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? dsinks, "
      "Tensor(f!)? dposition_table, Tensor(g!)? dtime_table, Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
      "Tensor q, Tensor k, Tensor v, Tensor code, Tensor? ptr, Tensor? runs, int block_q, int block_k, Tensor? bias, "
      "Tensor? sinks, Tensor? position_table, "
      "Tensor? q_pos, Tensor? k_pos, Tensor? time_table, Tensor? q_time, Tensor? k_time, Tensor? edges, float scale, "
      "float softcap, bool silu, float norm) -> ()");
  m.def(
      "sparse_attention_plain_cpu(Tensor q, Tensor k, Tensor v, Tensor code, Tensor? ptr, Tensor? runs, int block_q, "
      "int block_k, float scale) -> (Tensor, Tensor)");
  m.def("mask_bits_cpu(Tensor(a!) out, Tensor code) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("sparse_attention_fwd_cpu", TORCH_BOX(&attention_fwd));
  m.impl("sparse_attention_bwd_cpu", TORCH_BOX(&attention_bwd));
  m.impl("sparse_attention_plain_cpu", TORCH_BOX(&attention_plain));
  m.impl("mask_bits_cpu", TORCH_BOX(&mask_bits));
}
