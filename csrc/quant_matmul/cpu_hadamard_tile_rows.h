// Rows of halves in tiles: which of them, and in what order they are read, multiplied and written. Where there are
// tiles, bfloat16 rows of 2^k points take them from 32 on, of m 2^k all but few, float16 rows of m 2^k up to 28.
//
// What is stored is loaded some time later: tiles wait long for a line on its way to the L1.
#pragma once
#include "quant_matmul/cpu_hadamard_products.h"

#if defined(__AVX512F__)
namespace {

template <class S>
class TileRows {
 public:
  explicit TileRows(const scalekern::HadamardArgs& a) : whole_(a), runs_(a, takes_runs(a)), blocks_(takes_blocks(a)) {}

  // Rows: Transform. False: these rows go another way.
  template <class Rows>
  bool take(const Rows& t, int64_t begin, int64_t end) const {
    if constexpr (sizeof(S) == 2)
      if (whole_) return products(t, begin, end), true;
    if constexpr (__is_same(S, bf16)) {
      if (runs_) return of_runs(t, begin, end), true;
      if (blocks_) return t.a.n <= kTilePoints ? short_ones(t, begin, end) : long_ones(t, begin, end), true;
    }
    return false;
  }

 private:
  static constexpr int64_t kTogether = 1 << 11;    // points of rows that are multiplied before they are finished
  static constexpr int64_t kAheadPoints = 1 << 11;  // of rows that are asked for as a whole before their turn
  static constexpr int kMostBits = 13, kLowBits = 9;

  static bool takes(const scalekern::HadamardArgs& a) {
    return __is_same(S, bf16) && a.out && a.n == a.m << a.k && a.k <= kMostBits && scalekern::has_amx();
  }
  bool takes_runs(const scalekern::HadamardArgs& a) const {
    const int most = a.m == 12 ? 5 : a.m == 40 || known_signs(a.signs, a.m) ? 4 : kMostBits;
    return takes(a) && !whole_ && a.m > 1 && a.k >= RunProduct::kLeast && a.k <= most;
  }
  static bool takes_blocks(const scalekern::HadamardArgs& a) {
    return takes(a) && a.k >= kTileStages && (a.m == 1 || a.n >= kTilePoints);
  }

  // 32 rows at a time, the last ones again where fewer are left. Their parts, their sums and their output are made a
  // turn apart.
  template <class Rows>
  void products(const Rows& t, int64_t begin, int64_t end) const {
    constexpr int64_t most = WholeProduct<S>::kRows;
    const auto& a = t.a;
    const int64_t count = end - begin < most ? end - begin : most, points = most * a.n;
    const int64_t batches = (end - begin + most - 1) / most;
    float *const sums = t.buffer, *const parts = sums + 2 * points;
    S* const here = reinterpret_cast<S*>(t.line);
    const auto first = [&](int64_t batch) { return batch + 1 < batches ? begin + most * batch : end - count; };
    const auto gathered = [&](int64_t i) {
      for (int64_t r = 0; r < count; ++r) t.gather(i + r, here + r * a.n);
      return static_cast<const S*>(here);
    };
    Tiles tiles;
    whole_.shape(tiles);
    for (int64_t turn = 0; turn < batches + 2; ++turn) {
      if (kParts<S> == 2 && turn < batches) {
        const S* x = t.packed() && count == most ? t.row_of_x(first(turn)) : gathered(first(turn));
        for (int64_t j = 0; j < points; j += 16) store(parts + turn % 2 * points + j, two_parts(load_as<float>(x + j)));
      }
      if (turn > 0 && turn <= batches) {
        const int64_t i = first(turn - 1), odd = (turn - 1) % 2 * points;
        if (kParts<S> == 2) whole_.multiply(sums + odd, parts + odd, 4 * a.n);
        else if (a.stride_n != 1 || a.axes > 1 || count < most) whole_.multiply(sums + odd, gathered(i), 2 * a.n);
        else whole_.multiply(sums + odd, t.row_of_x(i), a.axes ? 2 * a.stride[0] : 0);
      }
      if (turn > 1) {
        S* const out = static_cast<S*>(a.out) + first(turn - 2) * a.n;
        store_scaled(count < most ? here : out, sums + turn % 2 * points, points, float(t.scale));
        if (count < most) __builtin_memcpy(out, here, sizeof(S) * size_t(count * a.n));
      }
    }
  }

  template <class Rows>
  static const bf16* row_of_x(const Rows& t, int64_t i) {
    if (t.a.stride_n == 1) return reinterpret_cast<const bf16*>(t.row_of_x(i));
    t.gather(i, reinterpret_cast<S*>(t.line));
    return reinterpret_cast<const bf16*>(t.line);
  }

  // Rows of m 2^k points.
  template <class Rows>
  void of_runs(const Rows& t, int64_t begin, int64_t end) const {
    const auto& a = t.a;
    const int k = int(a.k), bits = (k < kLowBits ? k : kLowBits) - kTileStages;
    const int64_t most = a.n < kTogether ? kTogether / a.n : 1, half = a.n / 2, run = int64_t(1) << k;
    Tiles tiles;
    runs_.shape(tiles);
    for (int64_t i = begin; i < end; i += most) {
      const int64_t count = end - i < most ? end - i : most, size = count * a.n;
      for (int64_t r = 0; r < count; ++r) {
        const bf16* const x = row_of_x(t, i + r);
        for (int64_t j = 0; j < a.n; j += runs_.points()) runs_.multiply(t.buffer + r * a.n + j, x + j);
      }
      for (float* y = t.buffer; a.m == 40 && y < t.buffer + size; y += a.n) pass<float, 1>(y, half, y, half, half);
      for (float* y = t.buffer; k > kLowBits && y < t.buffer + size; y += run) t.template top_pass<kLowBits>(y, k);
      bf16* const out = static_cast<bf16*>(a.out) + i * a.n;
      if (k == 3) last_of_tiles<0, 2>(out, t.buffer, size, float(t.scale));
      else if (k == 4) last_of_tiles<0, 3>(out, t.buffer, size, float(t.scale));
      else last_of_blocks<4>(out, t.buffer, size, bits, float(t.scale));
    }
  }

  // Rows of 2^k points up to 512, as many as make 16 blocks; a tile is made while that before it is in the last pass.
  template <class Rows>
  void short_ones(const Rows& t, int64_t begin, int64_t end) const {
    const auto& a = t.a;
    const BlockTiles tiles;
    alignas(64) float blocks[2][kTilePoints];
    const int64_t most = kTilePoints / a.n;
    const auto make = [&](int64_t i, float* to) {
      const S* from = reinterpret_cast<const S*>(t.line);
      if (t.packed() && i + most <= end) from = t.row_of_x(i);
      else for (int64_t r = 0; r < most && i + r < end; ++r) t.gather(i + r, reinterpret_cast<S*>(t.line) + r * a.n);
      transform_blocks(to, reinterpret_cast<const bf16*>(from));
    };
    make(begin, blocks[0]);
    for (int64_t i = begin, odd = 0; i < end; i += most, odd ^= 1) {
      if (i + most < end) make(i + most, blocks[odd ^ 1]);
      const int64_t size = (end - i < most ? end - i : most) * a.n;
      last_of_blocks<0>(static_cast<bf16*>(a.out) + i * a.n, blocks[odd], size, int(a.k) - kTileStages, float(t.scale));
    }
  }

  // Longer ones. What a row's last pass has read makes room for the next row's first, so that x is read and the output
  // is written side by side, and each in order, as a copy does.
  template <class Rows>
  void long_ones(const Rows& t, int64_t begin, int64_t end) const {
    const auto& a = t.a;
    const BlockTiles tiles;
    const int k = int(a.k), bits = (k < kLowBits ? k : kLowBits) - kTileStages;
    const int64_t run = int64_t(1) << k, final = a.n - kTilePoints;
    const bf16* from = row_of_x(t, begin);
    const auto make = [&](int64_t j) {
      if (j > final) j = final;  // again what the tile before it made
      transform_blocks(t.buffer + j, from + j);
    };
    for (int64_t j = 0; j < a.n; j += kTilePoints) make(j);
    for (int64_t i = begin; i < end; ++i) {
      if (a.n <= kAheadPoints && a.stride_n == 1 && i + 1 < end)
        for (int64_t j = 0; j < a.n; j += 32) __builtin_prefetch(t.row_of_x(i + 1) + j, 0, 2);
      if (a.m > 1) t.base.multiply(t.buffer, run, t.buffer, run, run);
      for (int64_t j = 0; j < a.n && k > kLowBits; j += run) t.template top_pass<kLowBits>(t.buffer + j, k);
      if (i + 1 < end) from = row_of_x(t, i + 1);
      for (int64_t j = 0; j < a.n; j += kTilePoints) {
        const int64_t size = j < final ? kTilePoints : a.n - j;
        last_of_blocks<0>(static_cast<bf16*>(a.out) + i * a.n + j, t.buffer + j, size, bits, float(t.scale));
        if (i + 1 < end) make(j);
      }
    }
  }

  const WholeProduct<S> whole_;
  const RunProduct runs_;
  const bool blocks_;
};

}  // namespace
#endif
