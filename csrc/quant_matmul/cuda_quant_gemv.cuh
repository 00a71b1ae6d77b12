// Products of few tokens with a low-bit weight in its plain layout.
//
// Shape letters: M tokens, N outputs, K inputs, G groups of columns.
//
// Never measured. Bound: the weight's bytes. Where an FMA a code and token is the limit of the Triton kernel (4.5
// instructions a W4 code for one token, 11.2 for four), here codes become operands of mma.m16n8k16, 32 bits with two of
// them at a time, and up to 8 tokens cost what one does; products are exact, sums float32, scales meet the sum of a
// group. Lanes need not hold neighbouring columns, only the same ones of weight and x: a lane reads 32 codes in a row,
// as they lie. Instructions a code in the sm_90a loop, all told (bfloat16, float16 scales, no zeros):
//
//     int4 2.4, int2 2.0, int1 1.7, int3 2.9, int8 3.6, nf4 4.2; from three tokens on int2 2.3, int1 2.3
//
// Predicted for N = K = 8192, float16 scales of groups of 128, in us; bytes at 3.0 TB/s (H100) and 4.2 TB/s (H200),
// instructions at 132 x 128 lanes x 1.755 GHz, the half of them that are bit operations at half that rate:
//
//              bytes H100, H200   instructions   bit operations   with 1.5 of ramp and tail, M = 1 / 4 / 8 on an H100
//     int4     11.5   8.2         5.5            5.0              13 / 13 / 14 (of x 0.5 MB an SM's L1 at M = 8)
//     int2      5.9   4.2         4.5            3.9              7.5 / 7.5 / 8
//     int1      3.1   2.2         3.9            3.5              5.5 / 7 / 7
//
// Split: a warp has 32 rows, two tiles of the product, and every eighth step of K (of 128 columns; of 256 and 512 for
// 2 and 1 bits of one or two tokens, so that a lane loads 16 bytes); a block is the 8 warps of 32 rows, which add up
// through shared memory in order: no atomics, the same bits every time. N = 8192 is 256 blocks, two an SM. The codes
// and scales of two steps (one, from 5 bits on) are under way before the first is used: 16 warps x 2 steps x 2 KB,
// 64 KB an SM, where 25 bytes a ns in 0.8 us need 20 KB. x stays in the L1, which the weight bypasses.
//
// Groups smaller than a step: B has 8 columns, so each of a row's four lanes gets a column of its own for either of two
// tokens, at no cost but that of more passes for more tokens. Zeros and offsets meet the sum of x, a product with ones.
#pragma once
#include "quant_matmul/cuda_quant_parts.cuh"

namespace scalekern::gemv {

// w[n, k] = outer[n] (scales[n, g] (value(code[n, k]) - zeros[n, g]) + offsets[n, g]);
// value(code) = step code + base, or table[code]. The codes of a row are a stream of bits, the lowest first.
struct Args {
  const uint8_t* data;
  int64_t row_bytes, far_pitch;  // bytes from row to row
  int pitch;                     // the same, for Tiles
  int rows, columns, tokens, groups, bits;
  float step, base, zero;
  const float* table;
  Part x, scales, zeros, offsets, outer, bias;
  Column scale, zeros_of, offset;  // scales, zeros and offsets
  void* out;
  int out_kind;
  int64_t out_m, out_n;
  Divisor by_group;
  int row_blocks;
};

// By tensor cores. A warp has 32 rows; the 8 warps of a block take turns along K and add up in order in the end.
//
// kApart: the four lanes of a row hold columns of different groups, so that each has a column of the product to
// itself: two tokens at a time. Else a column is a token, and there are eight. kUnits: of 32 codes, that a lane loads.
template <class T, int kBits, int kCentre, int kUnits, bool kApart>
struct Tiles {
  using Args = gemv::Args;
  using C = Codes<T, kBits, kCentre>;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kWarps = kThreads / 32, kTiles = 2, kRows = 16 * kTiles;  // of a block
  static constexpr int kTokens = kApart ? 2 : 8, kChunk = 32 * kUnits, kStep = 4 * kChunk;
  static constexpr int kWords = kBits * kUnits, kStages = kWords > 4 ? 1 : 2;
  static constexpr int kLines = 2 * kTiles, kColumns = kApart ? 2 : 1;  // of a lane, with groups of their own
  static constexpr int kPairs = kApart && kBits > 1 ? 8 : 16;  // whose x is in registers at a time
  static constexpr int kSharedBytes = kWarps * kRows * 8 * 4;

  struct Stage {
    uint32_t w[kLines][kWords], scales[kColumns][kLines], zeros[kLines];
  };

  struct Warp {
    const Args& a;
    int t, row;         // row: this lane's first; the others come 8 apart, two in a tile
    const uint16_t* x;  // null: no token of this lane
    Planes planes;

    SK_DEVICE void find_rows(int (&rows)[kLines]) const {  // again and again: they would take registers
#pragma unroll
      for (int i = 0; i < kLines; ++i) rows[i] = row + 8 * i < a.rows ? row + 8 * i : a.rows - 1;
    }

    // The group of a column of the product.
    SK_DEVICE int group_of(int step, int c) const {
      const int k = step * kStep + (kApart ? (2 * t + c) % 4 * kChunk : 0);
      return a.by_group.quotient(k < a.columns ? k : a.columns - 1);
    }

    SK_DEVICE void load(Stage& s, int step) const {
      int rows[kLines];
      find_rows(rows);
      const int k = step * kStep + t * kChunk;
      const uint8_t* from = a.data + int64_t(step * 4 + t) * (4 * kWords);
#pragma unroll
      for (int i = 0; i < kLines; ++i) load_words<kWords>(s.w[i], from + int64_t(rows[i]) * a.pitch, k < a.columns);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int group = group_of(step, c);
        fetch(s.scales[c], a.scale, group, rows);
        if (!kApart && a.zeros_of.data) fetch(s.zeros, a.zeros_of, group, rows);
      }
      loads_begin_above();
    }

    // x of a part of unit u, in the order of the codes' pairs.
    SK_DEVICE void load_x(uint32_t (&b)[kPairs], int step, int u, int part) const {
      const int k = step * kStep + t * kChunk + 32 * u + 2 * kPairs * part;
      loads_begin_above();  // not yet: it would take registers of the parts before
      uint32_t two[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; i += 4) {
        Pack<uint32_t> four{};
        if (x && k < a.columns) four = *reinterpret_cast<const Pack<uint32_t>*>(x + k + 2 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) two[i + j] = four.v[j];
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int first = C::first(i), second = C::second(i);
        b[i] = permute(two[first / 2], two[second / 2], (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
      }
    }

    template <int kPart>
    SK_DEVICE void multiply_part(float (&part)[kTiles][4], float (&sum)[4], const Stage& s, int step, int u) const {
      uint32_t b[kPairs];
      load_x(b, step, u, kPart);
      const auto products = [&](const auto& operands) {
        unrolled([&](auto i) {
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            uint32_t operand[4];
            operands(std::integral_constant<int, i + kPart * kPairs / 2>(), r, operand);
            multiply<T>(part[r], operand, b[2 * i], b[2 * i + 1]);
          }
        }, std::make_integer_sequence<int, kPairs / 2>());
      };
      if constexpr (kCentre == kTable) {
        products([&](auto i, int r, uint32_t (&operand)[4]) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t pairs[2];
            planes.look_up(s.w[2 * r + h][u * kBits + i / 2] >> i % 2 * 16, pairs);
            operand[h] = pairs[0], operand[2 + h] = pairs[1];
          }
        });
      } else {
        const C codes[kLines] = {C(s.w[0] + u * kBits), C(s.w[1] + u * kBits), C(s.w[2] + u * kBits),
                                 C(s.w[3] + u * kBits)};
        products([&](auto i, int r, uint32_t (&operand)[4]) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            operand[h] = codes[2 * r + h].template pair<2 * i>();
            operand[2 + h] = codes[2 * r + h].template pair<2 * i + 1>();
          }
        });
      }
      if (a.zeros_of.data || a.offset.data) {  // sums of x: a product with ones
        const uint32_t ones[4] = {twice<T>(1), twice<T>(1), twice<T>(1), twice<T>(1)};
#pragma unroll
        for (int i = 0; i < kPairs; i += 2) multiply<T>(sum, ones, b[i], b[i + 1]);
      }
    }

    SK_DEVICE void fetch_numbers(float (&to)[kColumns][kLines], const Column& p, int step) const {
      int rows[kLines];
      find_rows(rows);
      for (int c = 0; c < kColumns; ++c) {
        uint32_t raw[kLines];
        fetch(raw, p, group_of(step, c), rows);
        convert(to[c], raw, p.kind);
      }
    }

    SK_DEVICE void add(float (&acc)[kTiles][4], const Stage& s, int step) const {
      float part[kTiles][4] = {}, sum[4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        multiply_part<0>(part, sum, s, step, u);
        if constexpr (kPairs < 16) multiply_part<1>(part, sum, s, step, u);
      }
      // The elements of a tile in a lane: two columns of row g, two of row g + 8.
      const auto each = [&](auto&& change) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i)
          change(acc[i / 4][i % 4], part[i / 4][i % 4], sum[i % 2], kApart ? i % 2 : 0, i / 2);
      };
      float numbers[kColumns][kLines];
      if (a.zeros_of.data) {
        constexpr int kMiddle = kCentre == kTable ? 0 : kBits == 1 ? 0 : kCentre;
        if constexpr (kApart) fetch_numbers(numbers, a.zeros_of, step);  // ahead it would take registers
        else convert(numbers[0], s.zeros, a.zeros_of.kind);
        each([&](float&, float& p, float all, int c, int line) { p -= (numbers[c][line] - kMiddle) * all; });
      }
      for (int c = 0; c < kColumns; ++c) convert(numbers[c], s.scales[c], a.scale.kind);
      each([&](float& to, float p, float, int c, int line) { to = fused(numbers[c][line], p, to); });
      if (a.offset.data) {
        fetch_numbers(numbers, a.offset, step);
        each([&](float& to, float, float all, int c, int line) { to = fused(numbers[c][line], all, to); });
      }
    }
  };

  static SK_DEVICE void run(const Args& a) {
    const int tile = int(block_index()) / a.row_blocks, first_token = tile * kTokens;
    const int row = (int(block_index()) - tile * a.row_blocks) * kRows;
    const int lane = thread_index() % 32, warp = thread_index() / 32, g = lane / 4, t = lane % 4;
    const int token = first_token + (kApart ? g / 4 : g);
    Warp w{a, t, row + g, nullptr, {}};
    if (token < a.tokens && (!kApart || g % 4 == t)) w.x = static_cast<const uint16_t*>(a.x.data) + token * a.x.row;
    const int steps = (a.columns + kStep - 1) / kStep;
    Stage stages[kStages];
#pragma unroll
    for (int i = 0; i < kStages; ++i)
      if (warp + i * kWarps < steps) w.load(stages[i], warp + i * kWarps);
    if constexpr (kCentre == kTable) w.planes = Planes::of<T>(a.table);
    float acc[kTiles][4] = {};
    for (int step = warp; step < steps; step += kStages * kWarps) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        const int now = step + i * kWarps, next = now + kStages * kWarps;
        if (now >= steps) break;
        w.add(acc, stages[i], now);
        if (next < steps) w.load(stages[i], next);
      }
    }

    // [kWarps][kRows][8]
    float* parts = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[(warp * kRows + 16 * r + 8 * (i / 2) + g) * 8 + 2 * t + i % 2] = acc[r][i];
    sync_threads();
    const int n = row + thread_index() / kTokens % kRows, m = first_token + thread_index() % kTokens;
    if (thread_index() >= kRows * kTokens || n >= a.rows || m >= a.tokens) return;
    float total = 0;
    for (int i = 0; i < kWarps; ++i)
#pragma unroll
      for (int c = 0; c < 8 / kTokens; ++c)
        total += parts[(i * kRows + n - row) * 8 + (m - first_token) * (8 / kTokens) + c];
    finish(a, m, n, total);
  }
};

// What Tiles does not take: any format, group, alignment and stride. A warp a row, a code at a time, float32.
struct Plain {
  using Args = gemv::Args;
  static constexpr int kThreads = 128, kBlocks = 1, kRows = kThreads / 32, kTokens = 4;

  static SK_DEVICE void run(const Args& a) {
    const int tile = int(block_index()) / a.row_blocks, first_token = tile * kTokens;
    const int n = (int(block_index()) - tile * a.row_blocks) * kRows + thread_index() / 32, lane = thread_index() % 32;
    const int64_t row = n < a.rows ? n : a.rows - 1;
    const uint8_t* codes = a.data + row * a.far_pitch;
    float acc[kTokens] = {};
    for (int k = lane; k < a.columns; k += 32) {
      const int64_t bit = int64_t(k) * a.bits, byte = bit / 8;
      const int word = codes[byte] | (byte + 1 < a.row_bytes ? codes[byte + 1] << 8 : 0);
      const int code = word >> bit % 8 & ((1 << a.bits) - 1), group = a.by_group.quotient(k);
      const float value = a.table ? a.table[code] : a.step * float(code) + a.base;
      const float zero = a.zeros.data ? number_at(a.zeros, row * a.zeros.row + group * a.zeros.column) : a.zero;
      float w = number_at(a.scales, row * a.scales.row + group * a.scales.column) * (value - zero);
      if (a.offsets.data) w += number_at(a.offsets, row * a.offsets.row + group * a.offsets.column);
#pragma unroll
      for (int m = 0; m < kTokens; ++m)
        if (first_token + m < a.tokens)
          acc[m] = fused(w, number_at(a.x, (first_token + m) * a.x.row + k * a.x.column), acc[m]);
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      for (int other = 16; other; other /= 2) acc[m] += shuffle_xor(acc[m], other);
      if (lane == m && n < a.rows && first_token + m < a.tokens) finish(a, first_token + m, n, acc[m]);
    }
  }
};

}  // namespace scalekern::gemv
