// Products of 8 to 64 tokens with a low-bit weight on the tensor cores, from a layout made for them (python/scalekern/
// ops/_quant_tiles_layout.py, once a weight): asynchronous copies, fragments of 16 x 16 as they are needed, stream-K.
//
// Shape letters: M tokens, N outputs, K inputs, G groups of columns. A tile is kRows outputs of all tokens, a step
// kStep columns of it, a unit one step of one tile.
//
// Never measured. Bounds at N = K = 8192 with groups of 128: the bytes, 33.5 MB of codes of 4 bits and 1.0 MB of
// float16 scales, 7.3 us at 4.8 TB/s (H200) and 10.4 us at 3.3 TB/s (H100); 2 M N K flops of mma.sync, which reaches
// about 620 of Hopper's 990 TFLOP/s (the rest is wgmma's): 3.5 us for 16 tokens, 14 us for 64. Predicted from those:
//
//     tokens                               8       16      32      64
//     bytes / products (H200, us)      7.3/1.7 7.3/3.5 7.3/7.0  7.3/14
//     shared memory read, of an SM's 128 B a clock, us: every warp reads all tokens of its rows
//                                         1.7     3.0     5.5    10.6
//     x and parts through the L2, MB      7      14      27      54
//
// and some 2 us for the second launch, which adds up. The loop of a unit has 358 instructions for 16 tokens (bfloat16,
// 4 bits, sm_90a), of which a weight without zeros executes some 240: 480 clocks of an SM for 8.7 KB, which take 420 at
// 4.8 TB/s and 600 at 3.35. Half of them are no products and no codes: a step of 128 columns would halve those, if a
// measurement asks for it. For 64 tokens wgmma is what would come next.
//
// Weights are the operand of 16 rows and tokens the one of 8 columns: of 8 tokens nothing is wasted. Codes become
// numbers in registers (cuda_quant_decode.cuh: one LOP3 puts two codes of a word into the mantissas of 1024 or of 128,
// one FMA takes that and the centre away again, exact), scales meet the float32 sum of a group, so that no weight is
// rounded. What zeros and offsets come to is one shift a group times the sum of its x, a product with ones.
//
// Split: a warp has 32 rows, two tiles of the product, and all tokens, so that a fragment of x serves two products and
// one of the weight all tokens; a block is 8 warps of rows, 256, since x comes through the L2 once for each tile of
// rows: 33 MB for 64 tokens, where 64 rows would make it 134 MB, four times the weight. So few tiles (32 of N = 8192)
// do not fill 132 SMs: all units are one row of steps, tile after tile, and each of the programs (one or two an SM)
// takes an equal share of it. Copies run ahead across the ends of tiles. What a program has summed of a tile goes to
// its place in scratch memory, and a second, small kernel adds those of a tile in order: nothing waits for another
// block, no atomics, the same bits every time for the same shapes and number of SMs.
//
// A stage is the codes of a unit (in the order of the fragments: a lane copies and reads its own, 16 bytes at a time),
// its tokens (rows of 128 bytes, pieces of 16 exchanged by an XOR with the row, so that eight rows of a fragment lie in
// different banks) and a row of scales for each group (two bytes or four a row). 3 or 4 of them take up to 96 KB, of 99
// that a block of sm_86 and sm_89 may have. In registers of a lane: M sums, M of the group, the codes of one unit.
//
// Untested without a GPU: alignment faults, bank conflicts, speed. What the emulator shows of the pipeline: copies that
// land as late and as early as they may, warps that fall behind.
#pragma once
#include "common/cuda_pipeline.cuh"
#include "quant_matmul/cuda_quant_parts.cuh"

namespace scalekern::tiles {

using namespace scalekern::device;
using gemv::Divisor, gemv::Part, gemv::unrolled;

constexpr int kRows = 256, kStep = 64, kThreads = 256;

// codes (tiles, steps, kRows kStep bits / 8 bytes), scales and shifts (tiles, G, kRows):
// w[n, k] = outer[n] (scales[n, g] (code[n, k] - 2^(bits - 1)) + shifts[n, g]).
struct Args {
  const uint8_t *codes, *scales, *shifts;
  const uint16_t* x;
  int64_t x_row;
  int tokens, columns, rows, groups, steps, tiles, programs, token_tiles;
  int scale_kind, scale_bytes, stage_bytes;
  Divisor by_group;
  float* parts;
  Part outer, bias;
  void* out;
  int out_kind;
  int64_t out_m, out_n;

  SK_FN int64_t units() const { return int64_t(tiles) * steps; }
  // Program p has the units from first_unit(p) to first_unit(p + 1).
  SK_FN int64_t first_unit(int p) const { return units() * p / programs; }
  SK_FN int program_of(int64_t unit) const { return int(((unit + 1) * programs - 1) / units()); }
  // What program p has summed of a tile: [2 token_tiles][kThreads][4], fragments as they are. From a part to the next
  // either number rises.
  SK_FN float* part(int p, int tile) const {
    return parts + (int64_t(p) + tile) * (2 * token_tiles * kThreads * 4);
  }
};

// kTokenTiles: of 8 tokens. kFine: groups that are multiples of 16 columns, not of a step.
template <class T, int kBits, int kTokenTiles, bool kFine>
struct StreamK {
  using Args = tiles::Args;
  using Codes = gemv::Codes<T, kBits, 1 << (kBits - 1)>;
  static constexpr int kThreads = tiles::kThreads, kBlocks = kTokenTiles <= 4 ? 2 : 1;
  static constexpr int kStages = kBits == 8 ? 3 : 4, kParts = kFine ? kStep / 16 : 1;
  static constexpr int kPieces = kBits / 2;  // of 16 bytes: the codes of a lane in a unit, of two tiles of 16 rows
  static constexpr int kCodeBytes = kRows * kStep * kBits / 8, kTokenBytes = 8 * kTokenTiles * kStep * 2;

  // A stage: codes, tokens [8 kTokenTiles][kStep], scales [kParts][kRows], shifts [kParts][kRows].
  static constexpr int stage_bytes(int scale_bytes, bool shifts) {
    return kCodeBytes + kTokenBytes + kParts * kRows * (scale_bytes + (shifts ? 4 : 0));
  }
  static_assert(kStages * stage_bytes(4, true) <= 99 * 1024);

  const Args& a;
  int lane = thread_index() % 32, warp = thread_index() / 32;

  SK_DEVICE void copy(unsigned char* stage, int tile, int step) const {
    // Addresses made anew for each unit: carried along they were 9 instructions of 358 less, and spills of registers.
    const int mine = (warp * kPieces * 32 + lane) * 16;
    const uint8_t* from = a.codes + (int64_t(tile) * a.steps + step) * kCodeBytes + mine;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) copy_in_group(stage + mine + i * 512, from + i * 512);
#pragma unroll
    for (int i = 0; i < (64 * kTokenTiles + kThreads - 1) / kThreads; ++i) {
      const int piece = thread_index() + i * kThreads, row = piece / 8, k = step * kStep + piece % 8 * 8;
      if (64 * kTokenTiles % kThreads && piece >= 64 * kTokenTiles) break;
      const bool on = row < a.tokens && k < a.columns;
      copy_in_group(stage + kCodeBytes + place(row, piece % 8), a.x + (on ? row * a.x_row + k : 0), on);
    }
    unsigned char* scales = stage + kCodeBytes + kTokenBytes;
    unsigned char* shifts = scales + kParts * kRows * a.scale_bytes;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int k = step * kStep + part * 16;
      const int64_t first = (int64_t(tile) * a.groups + a.by_group.quotient(k < a.columns ? k : a.columns - 1)) * kRows;
      const int at = thread_index() * 16, bytes = kRows * a.scale_bytes;
      if (at < bytes) copy_in_group(scales + part * bytes + at, a.scales + first * a.scale_bytes + at);
      const int other = at - 2 * kThreads * 4;  // the upper half of the threads
      if (a.shifts && other >= 0 && other < kRows * 4)
        copy_in_group(shifts + part * kRows * 4 + other, a.shifts + first * 4 + other);
    }
  }

  // Where piece `piece` (8 columns) of a token lies among the tokens.
  static SK_DEVICE int place(int token, int piece) { return token * (kStep * 2) + (piece ^ token % 8) * 16; }

  // Columns 16 block to 16 block + 15 of token tiles n and, in the latter words, n + 1 (if there is one).
  static constexpr int kAtOnce = kTokenTiles == 1 ? 1 : 2;
  SK_DEVICE void load_tokens(uint32_t (&b)[2 * kAtOnce], const unsigned char* stage, int n, int block) const {
    const int token = 8 * (n + (kAtOnce == 1 ? 0 : lane / 16)) + lane % 8;
    load_matrices(b, stage + kCodeBytes + place(token, 2 * block + lane / 8 % 2));
  }

  SK_DEVICE void multiply_unit(float (&acc)[2][kTokenTiles][4], const unsigned char* stage) const {
    uint32_t words[2 * kBits];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const auto four = reinterpret_cast<const Pack<uint32_t>*>(stage)[(warp * kPieces + i) * 32 + lane];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * i + j] = four.v[j];
    }
    const Codes codes[2] = {Codes(words), Codes(words + kBits)};
    float part[2][kTokenTiles][4] = {};
    unrolled([&](auto block) {
      constexpr int k = block;
      uint32_t operand[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        operand[r][0] = codes[r].template pair<4 * k>(), operand[r][1] = codes[r].template pair<4 * k + 1>();
        operand[r][2] = codes[r].template pair<4 * k + 2>(), operand[r][3] = codes[r].template pair<4 * k + 3>();
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; n += kAtOnce) {
        uint32_t b[2 * kAtOnce];
        load_tokens(b, stage, n, k);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) gemv::multiply<T>(part[r][n + i], operand[r], b[2 * i], b[2 * i + 1]);
      }
      if constexpr (kFine) add_group(acc, part, stage, k);
    }, std::make_integer_sequence<int, kStep / 16>());
    if constexpr (!kFine) add_group(acc, part, stage, 0);
  }

  // acc += scale part + shift (sum of the group's x); part = 0
  SK_DEVICE void add_group(
      float (&acc)[2][kTokenTiles][4], float (&part)[2][kTokenTiles][4], const unsigned char* stage, int group) const {
    const unsigned char* scales = stage + kCodeBytes + kTokenBytes;
    float factor[2][2];
    const auto read = [&](auto&& number) {
#pragma unroll
      for (int i = 0; i < 4; ++i) factor[i / 2][i % 2] = number(group * kRows + 32 * warp + 8 * i + lane / 4);
    };
    const auto half = [&](int i) { return reinterpret_cast<const uint16_t*>(scales)[i]; };
    if (a.scale_kind == gemv::kF16) read([&](int i) { return widen(f16{half(i)}); });
    else if (a.scale_kind == gemv::kBf16) read([&](int i) { return widen(bf16{half(i)}); });
    else read([&](int i) { return reinterpret_cast<const float*>(scales)[i]; });
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[r][n][i] = fused(factor[r][i / 2], part[r][n][i], acc[r][n][i]);
          part[r][n][i] = 0;
        }
    if (!a.shifts) return;
    read([&](int i) { return reinterpret_cast<const float*>(scales + kParts * kRows * a.scale_bytes)[i]; });
    const uint32_t ones[4] = {gemv::twice<T>(1), gemv::twice<T>(1), gemv::twice<T>(1), gemv::twice<T>(1)};
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += kAtOnce) {
      float sums[kAtOnce][4] = {};
#pragma unroll
      for (int block = 0; block < kStep / 16 / kParts; ++block) {
        uint32_t b[2 * kAtOnce];
        load_tokens(b, stage, n, group + block);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) gemv::multiply<T>(sums[i], ones, b[2 * i], b[2 * i + 1]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 4 * kAtOnce; ++i)
          acc[r][n + i / 4][i % 4] = fused(factor[r][i % 4 / 2], sums[i / 4][i % 4], acc[r][n + i / 4][i % 4]);
    }
  }

  SK_DEVICE void work() const {
    const int program = int(block_index());
    const int64_t begin = a.first_unit(program);
    const int count = int(a.first_unit(program + 1) - begin);
    int tile = int(begin / a.steps), step = int(begin - int64_t(tile) * a.steps);
    int next_tile = tile, next_step = step, next_stage = 0, stage = 0;  // next: to be copied
    const auto copy_next = [&](int unit) {
      if (unit < count) copy(shared_memory() + next_stage * a.stage_bytes, next_tile, next_step);
      copy_group();
      if (++next_step == a.steps) next_step = 0, ++next_tile;
      if (++next_stage == kStages) next_stage = 0;
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy_next(i);
    float acc[2][kTokenTiles][4] = {};
    for (int unit = 0; unit < count; ++unit) {
      copy_wait_but<kStages - 2>();
      sync_threads();  // others' copies are here as well; all are done with the stage before, which is filled next
      copy_next(unit + kStages - 1);
      multiply_unit(acc, shared_memory() + stage * a.stage_bytes);
      if (++stage == kStages) stage = 0;
      const bool ends = ++step == a.steps;
      if (ends || unit + 1 == count) {
        float* to = a.part(program, tile) + thread_index() * 4;
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i) {
          Pack<float> four;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float& sum = acc[i / kTokenTiles][i % kTokenTiles][j];
            four.v[j] = sum, sum = 0;
          }
          *reinterpret_cast<Pack<float>*>(to + i * (kThreads * 4)) = four;
        }
      }
      if (ends) step = 0, ++tile;
    }
  }

  static SK_DEVICE void run(const Args& a) { StreamK{a}.work(); }
};

// The parts of a tile, added in the order of their columns. A block has one fragment of each warp.
struct SumParts {
  using Args = tiles::Args;
  static constexpr int kThreads = tiles::kThreads, kBlocks = 4;

  static SK_DEVICE void run(const Args& a) {
    const int fragments = 2 * a.token_tiles, tile = int(block_index() / fragments);
    const int fragment = int(block_index()) - tile * fragments, r = fragment / a.token_tiles;
    const int64_t begin = int64_t(tile) * a.steps;
    float sum[4] = {};
    for (int p = a.program_of(begin), last = a.program_of(begin + a.steps - 1); p <= last; ++p) {
      const float* from = a.part(p, tile) + (fragment * kThreads + thread_index()) * 4;
      const auto four = *reinterpret_cast<const Pack<float>*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += four.v[i];
    }
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int n = tile * kRows + 32 * warp + 16 * r + lane / 4, m = 8 * (fragment - r * a.token_tiles) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i / 2 * 8 < a.rows && m + i % 2 < a.tokens) gemv::finish(a, m + i % 2, n + i / 2 * 8, sum[i]);
  }
};

}  // namespace scalekern::tiles
