// dx = dout w on the tile registers, in bfloat16 parts as cpu_quant_tiles.h has them: a number of w is one or a sum of two.
//
// The sum runs over rows of w, whose codes lie along columns: rows are decoded to bfloat16 as they lie (16 of 32 columns,
// the forward's tile_rows), and pairs of rows are interleaved to what a product takes, two permutations for 64 weights.
// dout is laid out once a call, 16 tokens of 32 rows; a product's results lie as dx does.
// Split: columns, and blocks of tokens, over threads: a sum over rows has one order, whatever the number of threads.
// Bound by decoding below 32 tokens, above by products and their loads from L2. Dense bfloat16 (float16) / this, 4096 x
//   4096 of int4 in groups of 128, two cores of a Sapphire Rapids, in turns, in a slow phase of the machine: 16 tokens
//   0.6 to 0.7 (0.7), 64 0.75 to 0.9 (1.3), 128 0.7 to 1.0, 512 0.85 to 1.2. As floats it was 0.4, 0.3 (0.7), 0.2, 0.15.
// Lost: blocks of 128 columns (bfloat16 of 16 tokens 5 to 6 ms for 3.5 to 4: each row of a block has its groups' parts
//   to read and a table to make); three parts, float32's six products: as long as floats from 64 tokens on, twice below.
//
// Left to the float path: tokens whose largest number is no number or far from 1, and blocks of tokens whose results are
// not finite, because a weight or a scale is not (cpu_quant_tiles.h says why).
#pragma once
#include "quant_matmul/cpu_quant_tiles.h"

#if defined(__AVX512F__)
namespace {

using scalekern::QuantMatmulBwdArgs;

class BackwardTiles {
 public:
  explicit BackwardTiles(const QuantMatmulBwdArgs& a)
      : a_(a), w_parts_(parts_of_weight(a)), dout_parts_(dout_parts(a)),
        steps_(pieces(a.w.rows, kTileColumns)), strips_(round_up(pieces(a.tokens, 16), 2)),
        dout_(strips_ * steps_ * dout_parts_ * kTile), held_(strips_ * 16) {}

  // As floats the others take as long or less.
  static bool is_faster(const QuantMatmulBwdArgs& a) {
    const int parts = parts_of_weight(a);
    if (!scalekern::has_amx()) return scalekern::has_bf16() && parts == 1 && dout_parts(a) == 1;
    return parts == 1 || (parts == 2 && a.tokens >= 16);
  }

  // `redo` takes a product of some tokens.
  template <class Redo>
  void run(const Redo& redo) {
    lay_tokens();
    const int64_t column_blocks = pieces(a_.w.columns, kColumns), token_blocks = pieces(strips_, kBlockStrips);
    const Buffer<bool> strange(token_blocks);
    for (int64_t i = 0; i < token_blocks; ++i) strange[i] = false;
    parallel_stretches(worth_it(), column_blocks * token_blocks, 1, [&](const auto& take) {
      Scratch s(*this);
      const Tiles registers;
      take([&](int64_t i, int64_t) {
        const int64_t block = i % token_blocks, strip = block * kBlockStrips;
        if (!columns_of(i / token_blocks * kColumns, strip, least(kBlockStrips, strips_ - strip), s))
          __atomic_store_n(strange + block, true, __ATOMIC_RELAXED);
      });
    });
    const auto left = [&](int64_t m) { return !held_[m] || strange[m / 16 / kBlockStrips]; };
    for (int64_t m = 0, end; m < a_.tokens; m = end) {
      for (end = m; end < a_.tokens && left(end) == left(m);) ++end;
      if (!left(m)) continue;
      QuantMatmulBwdArgs some = a_;
      some.tokens = end - m, some.dout = a_.dout.from(m), some.dx = a_.dx.from(m);
      redo(some);
    }
  }

 private:
  static constexpr int64_t kRows = 128, kColumns = 512, kBlockStrips = 16;  // of a block: of w, and of 16 tokens
  static constexpr uint32_t kSmallest = (127u - 90) << 23, kLargest = (127u + 100) << 23;  // 2^-90, 2^100

  struct Scratch {
    const Buffer<char> rows, pairs;           // of a block of w, as it lies and as products take it
    const Buffer<float> totals, parts, line;  // sums; of rows' groups; what is decoded or stored
    explicit Scratch(const BackwardTiles& b)
        : rows(kRows * kColumns * 2 * b.w_parts_), pairs(kRows * kColumns * 2 * b.w_parts_),
          totals(least(kBlockStrips, b.strips_) * 16 * kColumns), parts(kRows * GroupParts::floats(b.most_groups())),
          line(kColumns + kTileColumns) {}
  };

  // One for bfloat16, unless all of w have one scale: then its few numbers' rounding errors (2^-8) do not average.
  static int parts_of_weight(const QuantMatmulBwdArgs& a) {
    if (exact_when_scaled(a.w) && !a.w.outer.data) return 1;
    const int parts = parts_of(a.dx.dtype);
    return parts == 1 && a.w.groups == 1 && a.w.scales.row == 0 ? 2 : parts;
  }
  static int dout_parts(const QuantMatmulBwdArgs& a) {
    return int(least(parts_of(a.dout.dtype), parts_of(a.dx.dtype) + 1));
  }
  bool worth_it() const { return a_.tokens * a_.w.rows * a_.w.columns >= kParallelWork; }
  int64_t most_groups() const { return a_.w.groups == 1 ? 1 : least(a_.w.groups, kColumns / a_.w.group + 2); }
  Side dout(int64_t strip, int64_t step) const {
    return {dout_ + (strip * steps_ + step) * dout_parts_ * kTile, steps_ * dout_parts_ * kTile, dout_parts_};
  }

  void lay_tokens() {
    parallel_if(a_.tokens * a_.w.rows >= kParallelWork, strips_, [&](int64_t begin, int64_t end) {
      const int64_t padded = steps_ * kTileColumns;
      const Buffer<float> line(padded);
      for (int64_t m = begin * 16; m < end * 16; ++m) {
        char* to = dout_ + m / 16 * steps_ * dout_parts_ * kTile + m % 16 * kTileBytes;
        const int64_t count = m < a_.tokens ? a_.w.rows : 0;
        if (count) load_row(a_.dout, m, count, line);
        zero(line + count, padded - count);
        Words most = {};
        for (int64_t n = 0; n < padded; n += kTileColumns, to += dout_parts_ * kTile) {
          const VecF low = load(line + n), high = load(line + n + 16);
          const Words l = Words(low) & 0x7fffffff, h = Words(high) & 0x7fffffff;
          most = l > most ? l : most, most = h > most ? h : most;
          store_parts(low, high, dout_parts_, to, kTile);
        }
        uint32_t all = 0;
        for (int i = 0; i < 16; ++i) all = most[i] > all ? most[i] : all;
        held_[m] = all == 0 || (all >= kSmallest && all <= kLargest);
      }
    });
  }

  // Rows [n, n + rows) of w, of columns [first, first + count), in pairs: [strip of 16 columns][step of 32 rows][part].
  void decode_pairs(int64_t n, int64_t rows, int64_t first, int64_t count, Scratch& s) const {
    const QuantWeight& w = a_.w;
    const int64_t g = w.groups == 1 ? 0 : first / w.group;
    const int64_t groups = w.groups == 1 ? 1 : (first + count - 1) / w.group + 1 - g, floats = GroupParts::floats(groups);
    QuantWeight some = w.from(n, rows);
    some.groups = groups;
    some.scales = some.scales.behind(g * some.scales.column), some.zeros = some.zeros.behind(g * some.zeros.column);
    some.offsets = some.offsets.behind(g * some.offsets.column);
    for (int64_t r = 0; r < rows; ++r) GroupParts(s.parts + r * floats, groups).load(some, r);
    const auto own = [&](int64_t r) {
      GroupParts parts(s.parts + r * floats, groups);
      parts.scale -= g, parts.zero -= g, parts.offset -= g;
      return parts;
    };
    const int64_t column_steps = pieces(count, kTileColumns), pitch = column_steps * w_parts_ * kTile;
    const int64_t ahead = n + rows < w.rows ? rows * w.pitch : kColumns * w.bits / 8 - n * w.pitch;
    if (w_parts_ == 1) tile_rows<1>(w, n, rows, own, first, count, ahead, s.line, s.rows, pitch);
    else tile_rows<2>(w, n, rows, own, first, count, ahead, s.line, s.rows, pitch);
    const int64_t steps = pieces(rows, kTileColumns);
    for (int64_t r = rows; r < steps * kTileColumns; ++r)
      for (int64_t i = 0; i < column_steps * w_parts_; ++i)
        _mm512_store_si512(s.rows + r / 16 * pitch + i * kTile + r % 16 * kTileBytes, _mm512_setzero_si512());
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t strip = steps * w_parts_ * kTile;
    for (int64_t r = 0; r < steps * kTileColumns; r += 2) {
      const char* from = s.rows + r / 16 * pitch + r % 16 * kTileBytes;
      char* to = s.pairs + r / kTileColumns * w_parts_ * kTile + r % kTileColumns / 2 * kTileBytes;
      for (int64_t c = 0; c < column_steps; ++c, to += 2 * strip)
        for (int i = 0; i < w_parts_; ++i, from += kTile) {
          const __m512i even = _mm512_load_si512(from), odd = _mm512_load_si512(from + kTileBytes);
          _mm512_store_si512(to + i * kTile, _mm512_permutex2var_epi16(even, low, odd));
          _mm512_store_si512(to + strip + i * kTile, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
  }

  // dx of some columns and tokens; whether it is finite where it counts.
  bool columns_of(int64_t first, int64_t strip, int64_t strips, Scratch& s) const {
    const QuantWeight& w = a_.w;
    const int64_t count = least(kColumns, w.columns - first), column_strips = 2 * pieces(count, kTileColumns);
    const int64_t next = strips * 256;
    const float one[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    zero<float>(s.totals, column_strips * next);
    for (int64_t n = 0; n < w.rows; n += kRows) {
      const int64_t rows = least(kRows, w.rows - n), steps = pieces(rows, kTileColumns);
      decode_pairs(n, rows, first, count, s);
      const int64_t pitch = steps * w_parts_ * kTile;
      for (int64_t t = 0; t < strips; t += 2)
        for (int64_t c = 0; c < column_strips; c += 2)
          multiply_tiles<2, 2>(dout(strip + t, n / kTileColumns), {s.pairs + c * pitch, pitch, w_parts_}, steps, one, 0,
                               s.totals + c * next + t * 256, next);
    }
    VecF strange = {};
    for (int64_t m = strip * 16; m < least(a_.tokens, (strip + strips) * 16); ++m) {
      for (int64_t c = 0; c < column_strips; ++c)
        store(s.line + c * 16, load(s.totals + c * next + (m - strip * 16) * 16));
      store_row(a_.dx, m, first, count, s.line);
      zero(s.line + count, column_strips * 16 - count);
      for (int64_t c = 0; held_[m] && c < column_strips; ++c) strange += load(s.line + c * 16) * 0.0f;
    }
    return sum_of<float>(strange) == 0;
  }

  const QuantMatmulBwdArgs& a_;
  const int w_parts_, dout_parts_;
  const int64_t steps_, strips_;  // of 32 rows of w; of 16 tokens
  const Buffer<char> dout_;       // [strip][step][part]
  const Buffer<bool> held_;       // tokens
};

}  // namespace
#endif
