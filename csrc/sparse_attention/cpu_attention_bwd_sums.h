// Sums of the backward that several items add to: where each item adds, and how its part joins the others' in order.
//
// dk and dv, by tiles of keys: where an item adds follows from the mask alone. A tile that one split alone touches is
//   summed where it belongs, where that can be; for another, each split that touches it has a slot. A tile is cleared
//   when it is first added to, and so in L2.
//   A sum a split of all keys from its first to its last one took 1.3 to 2 times as long under a window and a sink
//   (4,096 tokens), 1.1 to 1.4 times under a window of 256 at 16,384. At 65,536 it was 138 MB, whose fresh pages cost
//   100 of 150 ms that the system spent on a call, and the time 1.11 to 1.2 times 16 times that of 4,096; now 1.0.
// A dbias, table or sink that several items add to has a part for each item.
#pragma once
#include "common/pages.h"
#include "sparse_attention/cpu_attention_tables.h"

namespace {

using scalekern::kInPlace;
using scalekern::kNoSlot;

template <class F>
struct Numbers : private Scratch {
  const int64_t count;
  F* const data;
  explicit Numbers(int64_t count) : Scratch(count * int64_t(sizeof(F))), count(count), data(take<F>(count)) {
    scalekern::expect_writes(data, count * int64_t(sizeof(F)));
  }
};

// Of gradients of keys, or of values.
template <class T>
class KeySums {
  using F = Compute<T>;
  const AttnArgs& a;
  const AttnTensor& t;
  const int64_t columns, ld, step;  // of a row in a slot, and between slots
  F* const slots;                   // [b][kv][slot][key][ld]
  int64_t keys(int64_t tile) const { return least(a.block_k, a.kv_len - tile * a.block_k); }

 public:
  KeySums(const AttnArgs& args, const AttnTensor& t, int64_t columns, int64_t ld, int64_t step, F* slots)
      : a(args), t(t), columns(columns), ld(ld), step(step), slots(slots) {}

  struct Tile {
    F* data;
    int64_t stride;
  };
  Tile at(int32_t slot, int64_t b, int64_t kv, int64_t tile) const {
    if (slot == kInPlace) return {::at<F>(t, b, kv, tile * a.block_k), t.s[2]};
    return {slots + ((b * a.kv_heads + kv) * a.slot_count + slot) * step, ld};
  }

  void clear(int32_t slot, int64_t b, int64_t kv, int64_t tile) const {
    const auto [to, stride] = at(slot, b, kv, tile);
    const int64_t rows = slot == kInPlace ? keys(tile) : a.block_k;
    for (int64_t r = 0; r < rows; ++r) __builtin_memset(to + r * stride, 0, size_t(ld) * sizeof(F));
  }

  // The splits' parts of a tile in order.
  void join(int64_t b, int64_t kv, int64_t tile, F scale, F* sums) const {
    const int64_t tiles = ceil_div(a.kv_len, a.block_k), count = keys(tile) * ld;
    __builtin_memset(sums, 0, size_t(count) * sizeof(F));
    for (int64_t s = 0; s < a.split_count; ++s) {
      const int32_t slot = a.slots[s * tiles + tile];
      if (slot == kInPlace) return;
      const F* from = at(slot, b, kv, tile).data;
      for (int64_t i = 0; slot != kNoSlot && i < count; ++i) sums[i] += from[i];
    }
    for (int64_t i = 0; scale != 1 && i < count; ++i) sums[i] *= scale;
    for (int64_t r = 0; r < keys(tile); ++r)
      store_line(::at<T>(t, b, kv, tile * a.block_k + r), t.s[3], columns, sums + r * ld);
  }
};

// What an item adds to, of its heads.
template <class F>
struct ItemSums {
  int64_t split, first_b, last_b, first_kv, last_kv;
  const int32_t* slots;  // of key tiles
  AttnTensor dbias;
  F *position, *time;  // of head 0: [entry], [entry][lane]
};

template <class T>
class Sums {
  using F = Compute<T>;
  static constexpr int W = kPanel<F>;
  const AttnArgs& a;
  const Tables<F>& tables;
  const int64_t row;         // of a slot, the longer of dk's and dv's
  const int64_t item_heads;  // of an item
  const int64_t bias_size, position_size, time_size;  // of an item
  int64_t table_heads(int64_t heads) const { return heads == 1 ? 1 : item_heads; }

 public:
  const int64_t items, position_stride, time_stride;  // between heads of tables' sums; 0 where all share a table
  const Numbers<F> dsinks;  // [split][b][h]

 private:
  const int64_t slot;  // dk's part of one and then dv's
  const Numbers<F> slots;
  const Numbers<F> dbias, dposition, dtime;  // [item]

 public:
  const KeySums<T> dk, dv;

  Sums(const AttnArgs& args, const Tables<F>& tables, int64_t ldk, int64_t ldv)
      : a(args), tables(tables), row(most(ldk, ldv)), item_heads(a.heads / a.head_groups),
        bias_size(a.bias_heads * a.q_len * a.kv_len),
        position_size(a.dposition ? table_heads(a.position_heads) * a.positions : 0),
        time_size(a.dtime ? table_heads(a.time_heads) * tables.time_entries() * W : 0),
        items(a.split_count * a.batch_groups * a.head_groups),
        position_stride(a.position_heads == 1 ? 0 : a.positions),
        time_stride(a.time_heads == 1 ? 0 : tables.time_entries() * W), dsinks(a.split_count * a.batch * a.heads),
        slot(a.block_k * (ldk + ldv)), slots(a.batch * a.kv_heads * a.slot_count * slot),
        dbias(a.partial_dbias ? a.batch_groups * bias_size : 0), dposition(items * position_size),
        dtime(items * time_size), dk(a, a.dk, a.dim, ldk, slot, slots.data),
        dv(a, a.dv, a.value_dim, ldv, slot, slots.data + a.block_k * ldk) {
    if (dbias.count == 0) return;
    scalekern::parallel(a.batch_groups, [&](int64_t first, int64_t last) {
      clear(dbias.data + first * bias_size, (last - first) * bias_size);
    });
  }

  ItemSums<F> item(int64_t index) const {
    const int64_t split = index % a.split_count, rest = index / a.split_count;
    const int64_t i = rest / a.head_groups, j = rest % a.head_groups, heads = a.kv_heads / a.head_groups;
    ItemSums<F> sums{split, a.batch * i / a.batch_groups, a.batch * (i + 1) / a.batch_groups, j * heads,
                     (j + 1) * heads, a.slots + split * ceil_div(a.kv_len, a.block_k), a.dbias, nullptr, nullptr};
    if (dbias.count)
      sums.dbias = {dbias.data + i * bias_size, {0, a.bias_heads == 1 ? 0 : a.q_len * a.kv_len, a.kv_len, 1}};
    const int64_t first = j * item_heads;
    if (a.dposition)
      sums.position = clear(dposition.data + index * position_size, position_size) - first * position_stride;
    if (a.dtime) sums.time = clear(dtime.data + index * time_size, time_size) - first * time_stride;
    return sums;
  }

  // key_scale: what the sums of dk lack.
  void join(F key_scale) const {
    const int64_t tiles = ceil_div(a.kv_len, a.block_k);
    for_items(a.slot_count ? a.batch * a.kv_heads * tiles : 0, worth_threads(a),
              [&](Scratch& scratch) { return scratch.take<F>(a.block_k * row); },
              [&](int64_t index, F* sums) {
                const int64_t head = index / tiles, b = head / a.kv_heads, kv = head % a.kv_heads;
                dk.join(b, kv, index % tiles, key_scale, sums), dv.join(b, kv, index % tiles, F(1), sums);
              });
    if (dbias.count) join_biases();
    if (a.dposition) join_positions();
    if (a.dtime) join_times();
    for (int64_t h = 0; a.dsinks && h < a.heads; ++h) {
      F sum = 0;
      for (int64_t i = 0; i < a.split_count * a.batch; ++i) sum += dsinks.data[i * a.heads + h];
      static_cast<F*>(a.dsinks)[h * a.dsinks_stride] = sum;
    }
  }

 private:
  static F* clear(F* p, int64_t count) {
    __builtin_memset(p, 0, size_t(count) * sizeof(F));
    return p;
  }

  void join_biases() const {
    const auto make = [&](Scratch& scratch) { return scratch.take<F>(a.kv_len); };
    for_items(a.bias_heads * a.q_len, true, make, [&](int64_t row, F* sums) {
      clear(sums, a.kv_len);
      for (int64_t i = 0; i < a.batch_groups; ++i)
        for (int64_t k = 0; k < a.kv_len; ++k) sums[k] += dbias.data[i * bias_size + row * a.kv_len + k];
      F* to = ::at<F>(a.dbias, 0, row / a.q_len, row % a.q_len);
      for (int64_t k = 0; k < a.kv_len; ++k) to[k * a.dbias.s[3]] = sums[k];
    });
  }

  // Sum over the items of head h's table, in order, of get(an item's sums of that head); a shared table is all items'.
  template <class Get>
  F sum_items(const F* parts, int64_t size, int64_t stride, int64_t h, const Get& get) const {
    F sum = 0;
    for (int64_t i = 0; i < a.batch_groups; ++i)
      for (int64_t j = stride ? h / item_heads : 0; j < (stride ? h / item_heads + 1 : a.head_groups); ++j)
        for (int64_t s = 0; s < a.split_count; ++s)
          sum += get(parts + ((i * a.head_groups + j) * a.split_count + s) * size + h % item_heads * stride);
    return sum;
  }

  void join_positions() const {
    constexpr int64_t kEntries = 1024;
    const int64_t chunks = ceil_div(a.positions, kEntries);
    scalekern::parallel(a.position_heads * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t h = index / chunks, first = index % chunks * kEntries;
        for (int64_t t = first; t < least(first + kEntries, a.positions); ++t)
          *(::at<F>(a.dposition, h, 0) + t * a.dposition.s[1]) =
              sum_items(dposition.data, position_size, position_stride, h, [&](const F* of) { return of[t]; });
      }
    });
  }

  void join_times() const {
    for (int64_t h = 0; h < a.time_heads; ++h) {
      F* to = ::at<F>(a.dtime, h, 0);
      for (int64_t t = 0; t <= a.edge_count; ++t) to[t * a.dtime.s[1]] = 0;
      for (int64_t t = 0; t < tables.time_entries(); ++t)
        to[tables.bucket(t) * a.dtime.s[1]] = sum_items(dtime.data, time_size, time_stride, h, [&](const F* of) {
          F sum = 0;
          for (int i = 0; i < W; ++i) sum += of[t * W + i];
          return sum;
        });
    }
  }
};

}  // namespace
