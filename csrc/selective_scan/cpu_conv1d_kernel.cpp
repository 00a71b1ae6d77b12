// Short causal depthwise convolution, forward and backward.
//
// Bound: memory, 8 bytes an element in fp32 (4 in half precision), beside one exponential and one division for silu.
// Layout: lanes lie along time (a tile is one channel, a tap further is one number further) or along channels (rows of
//   kConvBlock channels, a tap further is a row further). The loops of cpu_conv1d_line.h know only these distances, so
//   both layouts share them; filter, bias and parameter gradients stay in registers for a tile. Tokens whose history
//   lies in x go from memory to memory; a run's first tokens, the rest of a line, and strides without a 1 go through a
//   staged tile in L1 of compute-type numbers.
// Split: groups of kConvGroup tokens times blocks of channels, over threads. A tile reads its W - 1 tokens of halo
//   again instead of waiting for its neighbour; the backward recomputes the halo's pre-activations too.
// Backward: dpre = dout act'(pre) into a tile, then dx from it. Parameter gradients are summed for a group, then over
//   the groups in order, in double: the same bits whatever the number of threads.
// Tried and lost, fp32 forward with silu, one core with AVX-512: staging every tile, 1.17 ns an element instead of 0.61
//   (memory and arithmetic took turns); staged tiles of 128 tokens instead of 1,024, 0.84. rcp14 and a Newton step for
//   the division of silu: 12.4 cycles a vector instead of 11.1; on Zen 3 with AVX2 10.2 instead of 8.5.
// Measured, AVX2, two threads of a Zen 3, B1 D1536 L2048 in third-level cache, medians on a noisy machine: 1.1 ms with
//   silu (from 1.75), 0.5 without (from 1.0), a copy 0.3 to 0.4. Lines as long as a row instead of 256 tokens gave half
//   of it, the shorter gate and the prefetches the rest. Non-temporal stores: no gain while the output fits that cache.
#include "selective_scan/conv1d.h"
#include "selective_scan/cpu_conv1d_line.h"

namespace {

using scalekern::ConvArgs;
using scalekern::ConvPiece;
using scalekern::ConvRun;
using scalekern::ConvTensor;
using scalekern::kConvBlock;
using scalekern::kConvBlockTile;
using scalekern::kConvLine;
using scalekern::kConvTimeTile;

constexpr int64_t kHalo = kConvMaxWidth - 1;
// A tile with both halos and one vector of slack, in either layout.
constexpr int64_t kTileSize = (kConvBlockTile + 2 * kHalo) * kConvBlock + 64;
static_assert(kTileSize >= kConvTimeTile + 2 * kHalo + 64 && kTileSize >= kConvLine);  // a line of padding

// What a thread works in.
template <class F>
struct Scratch {
  alignas(64) F x[kTileSize], y[kTileSize];
  alignas(64) F filter[(kConvMaxWidth + 1) * kConvBlock];  // taps, then bias
  alignas(64) F sums[(kConvMaxWidth + 1) * kConvBlock];    // their gradients
};

// --- tiles between memory and L1 ---

// A block of channels in the call's layout: a position in a tile is token * tap + lane.
template <class T, class F = Compute<T>>
struct Block {
  const ConvArgs& a;
  Scratch<F>& l1;
  int64_t first, channels;          // channels of this block: one when lanes lie along time
  int64_t tap, step, lanes, pitch;  // lanes: vectors of a step cover them; pitch: between rows of the filter
  static constexpr int64_t vector = kLanes<F>;

  Block(const ConvArgs& args, Scratch<F>& scratch, int64_t index) : a(args), l1(scratch) {
    first = a.along_time ? index : index * kConvBlock;
    const int64_t left = a.channels - first;
    channels = a.along_time ? 1 : left < kConvBlock ? left : kConvBlock;
    tap = a.along_time ? 1 : kConvBlock;
    step = a.along_time ? kLanes<F> : kConvBlock;
    lanes = a.along_time ? 1 : channels;
    pitch = a.along_time ? kLanes<F> : kConvBlock;
    const int64_t copies = a.along_time ? kLanes<F> : 1;
    for (int64_t c = 0; c < channels * copies; ++c) {
      const int64_t d = first + (a.along_time ? 0 : c);
      for (int64_t k = 0; k < a.width; ++k)
        l1.filter[k * pitch + c] = *at<F>(a.weight.data, d * a.weight.d + k * a.weight.t);
      l1.filter[a.width * pitch + c] = a.bias.data ? *at<F>(a.bias.data, d * a.bias.d) : F(0);
    }
  }

  int64_t steps(int64_t tokens) const { return a.along_time ? (tokens + kLanes<F> - 1) / kLanes<F> : tokens; }

  T* element(const ConvTensor& t, int64_t b, int64_t token) const {
    return at<T>(t.data, b * t.b + first * t.d + token * t.t);
  }
  void stage(F* tile, const ConvTensor& t, int64_t b, int64_t token, int64_t count) const {
    const T* p = element(t, b, token);
    if (a.along_time) return widen(tile, p, t.t, count);
    for (int64_t i = 0; i < count; ++i) widen(tile + i * tap, p + i * t.t, t.d, channels);
  }
  void unstage(const ConvTensor& t, int64_t b, int64_t token, const F* tile, int64_t count) const {
    T* p = element(t, b, token);
    if (a.along_time) return narrow(p, t.t, tile, count);
    for (int64_t i = 0; i < count; ++i) narrow(p + i * t.t, t.d, tile + i * tap, channels);
  }
  void clear(F* tile, int64_t tokens) const { zero(tile, tokens * tap); }

  // The first token of a piece from which on histories lie in x; along time, whole vectors of tokens further.
  int64_t first_direct(const ConvRun& run, int64_t begin) const {
    const int64_t first = run.begin + a.width - 1;
    if (begin >= first) return begin;
    return a.along_time ? begin + steps(first - begin) * vector : first;
  }

  // x of the tokens [begin - (W - 1), end) of a run; before the run lies its initial state, or zeros.
  void stage_x(F* tile, const ConvRun& run, int64_t begin, int64_t end) const {
    begin -= a.width - 1;
    const int64_t before = begin < run.begin ? run.begin - begin : 0;
    if (before && run.initial >= 0) {
      stage(tile, a.initial, run.initial, a.width - 1 - before, before);
    } else {
      clear(tile, before);
    }
    if (end > begin + before) stage(tile + before * tap, a.x, run.row, begin + before, end - begin - before);
  }
};

// --- forward ---

// Tokens [begin, end) of a piece, through L1.
template <class T>
void forward_staged(Block<T>& block, const Lines<T>& lines, const ConvRun& run, int64_t begin, int64_t end) {
  auto& l1 = block.l1;
  const int64_t steps = block.steps(end - begin);
  block.stage_x(l1.x, run, begin, end);
  for (int64_t c = 0; c < block.lanes; c += block.vector)
    lines.forward_staged(l1.x + c, l1.y + c, block.tap, block.step, block.step, steps, l1.filter + c, block.pitch);
  block.unstage(block.a.out, run.row, begin, l1.y, end - begin);
}

// Tokens [begin, end) from memory to memory: their histories lie in x, and there is at least one vector of lanes.
// The last vector overlaps the one before it and writes the same numbers again.
template <class T>
void forward_direct(Block<T>& block, const Lines<T>& lines, const ConvRun& run, int64_t begin, int64_t end) {
  const ConvArgs& a = block.a;
  const int64_t vector = block.vector, lanes = a.along_time ? end - begin : block.channels;
  const T* x = block.element(a.x, run.row, begin - (a.width - 1));
  T* out = block.element(a.out, run.row, begin);
  if (a.along_time) {
    lines.forward_direct(x, out, 1, vector, vector, lanes / vector, block.l1.filter, block.pitch);
    if (lanes % vector)
      lines.forward_direct(x + lanes - vector, out + lanes - vector, 1, 0, 0, 1, block.l1.filter, block.pitch);
    return;
  }
  for (int64_t c = 0; c < lanes; c += vector) {
    const int64_t lane = c + vector <= lanes ? c : lanes - vector;
    lines.forward_direct(x + lane, out + lane, a.x.t, a.x.t, a.out.t, end - begin, block.l1.filter + lane, block.pitch);
  }
}

template <class T>
void forward_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece) {
  const ConvArgs& a = block.a;
  if (run.padding) {
    block.clear(block.l1.y, piece.end - piece.begin);
    return block.unstage(a.out, run.row, piece.begin, block.l1.y, piece.end - piece.begin);
  }
  const int64_t direct = block.first_direct(run, piece.begin);
  const bool possible =
      a.along_time ? a.x.t == 1 && a.out.t == 1 && direct + block.vector <= piece.end
                   : a.x.d == 1 && a.out.d == 1 && block.channels >= block.vector && direct < piece.end;
  if (!possible) return forward_staged(block, lines, run, piece.begin, piece.end);
  if (direct > piece.begin) forward_staged(block, lines, run, piece.begin, direct);
  forward_direct(block, lines, run, direct, piece.end);
}

// The last W - 1 inputs of every row or sequence; those before its begin come from its initial state.
template <class T>
void final_states(const ConvArgs& a, Block<T>& block) {
  for (int64_t r = 0; r < a.run_count; ++r) {
    const ConvRun& run = a.runs[r];
    if (run.final < 0) continue;
    block.stage_x(block.l1.x, run, run.end, run.end);
    block.unstage(a.final, run.final, 0, block.l1.x, a.width - 1);
  }
}

// --- backward ---

// dfinal goes to the run's last W - 1 inputs: those that lie in this tile, and those of the initial state.
template <class T, class F>
void add_dfinal(Block<T>& block, const ConvRun& run, int64_t begin, int64_t end, F* tile) {
  const ConvArgs& a = block.a;
  if (run.final < 0 || a.dfinal.data == nullptr) return;
  const int64_t first = run.end - (a.width - 1);
  for (int64_t p = begin > first ? begin : first; p < end; ++p) {
    const T* src = block.element(a.dfinal, run.final, p - first);
    for (int64_t c = 0; c < block.channels; ++c) tile[(p - begin) * block.tap + c] += to_float(src[c * a.dfinal.d]);
  }
}

// The gradient of the W - 1 inputs before the run, from the dpre of its first tokens.
template <class T, class F>
void dinitial_of_run(Block<T>& block, const ConvRun& run, const F* dpre, F* tile) {
  const ConvArgs& a = block.a;
  block.clear(tile, a.width - 1);
  const int64_t tokens = run.end - run.begin;
  for (int64_t i = 0; i < a.width - 1 && !run.padding; ++i)
    for (int64_t k = i < tokens ? 0 : i - tokens + 1; k <= i; ++k)
      for (int64_t c = 0; c < block.channels; ++c)
        tile[i * block.tap + c] += block.l1.filter[k * block.pitch + c] * dpre[(i - k) * block.tap + c];
  add_dfinal(block, run, run.begin - (a.width - 1), run.begin, tile);
  block.unstage(a.dinitial, run.initial, 0, tile, a.width - 1);
}

// dpre of the tokens [begin, end) of a piece into its tile, through L1; those from `halo` on are not counted.
template <class T, class F>
void dpre_staged(
    Block<T>& block, const Lines<T>& lines, const ConvRun& run, int64_t begin, int64_t halo, int64_t end, F* dpre) {
  const ConvArgs& a = block.a;
  F *x = block.l1.x, *filter = block.l1.filter, *sums = block.l1.sums;
  block.stage_x(x, run, begin, end);
  block.stage(dpre, a.dout, run.row, begin, end - begin);
  if (a.along_time) {  // the rest of the last vector must count for nothing
    zero(x + (end - begin) + a.width - 1, block.vector);
    zero(dpre + (end - begin), block.vector);
  }
  const Walk walk{block.step, block.step, block.step, block.tap};
  for (int64_t c = 0; c < block.lanes; c += block.vector)
    lines.dpre_staged(
        x + c, dpre + c, dpre + c, walk, block.steps(halo - begin), block.steps(end - begin), filter + c, sums + c,
        block.pitch);
}

// The same from memory: histories lie in x, and vectors are full.
template <class T, class F>
void dpre_direct(
    Block<T>& block, const Lines<T>& lines, const ConvRun& run, int64_t begin, int64_t halo, int64_t end, F* dpre) {
  const ConvArgs& a = block.a;
  const T* x = block.element(a.x, run.row, begin - (a.width - 1));
  const T* dout = block.element(a.dout, run.row, begin);
  const Walk walk = a.along_time ? Walk{block.vector, block.vector, block.vector, 1}
                                 : Walk{a.x.t, a.dout.t, block.step, a.x.t};
  for (int64_t c = 0; c < block.lanes; c += block.vector)
    lines.dpre_direct(
        x + c, dout + c, dpre + c, walk, block.steps(halo - begin), block.steps(end - begin), block.l1.filter + c,
        block.l1.sums + c, block.pitch);
}

// The tile of dpre of a piece and of the W - 1 tokens after it, with zeros behind the end of the run.
template <class T, class F>
void dpre_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece, F* dpre) {
  const ConvArgs& a = block.a;
  const int64_t after = run.end - piece.end, halo = after < a.width - 1 ? after : a.width - 1;
  const int64_t end = piece.end + halo, begin = piece.begin, vector = block.vector;
  // Lanes along time: a piece with a halo has full vectors only, so direct ones end where it begins.
  int64_t from = block.first_direct(run, begin), to = a.along_time ? from + (piece.end - from) / vector * vector : end;
  const bool possible =
      a.along_time ? a.x.t == 1 && a.dout.t == 1 : a.x.d == 1 && a.dout.d == 1 && block.lanes % vector == 0;
  if (!possible || from >= to) from = to = end;
  const auto tile = [&](int64_t token) { return dpre + (token - begin) * block.tap; };
  const auto counted = [&](int64_t token) { return token < piece.end ? token : piece.end; };
  if (from > begin) dpre_staged(block, lines, run, begin, counted(from), from, tile(begin));
  if (to > from) dpre_direct(block, lines, run, from, counted(to), to, tile(from));
  if (end > to) dpre_staged(block, lines, run, to, counted(end), end, tile(to));
  block.clear(tile(end), kHalo);
}

template <class T, class F>
void dx_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece, const F* dpre) {
  const ConvArgs& a = block.a;
  F *tile = block.l1.x, *filter = block.l1.filter;
  const int64_t tokens = piece.end - piece.begin, vector = block.vector;
  const bool adds_dfinal = a.dfinal.data && run.final >= 0 && piece.end > run.end - (a.width - 1);
  const bool contiguous = a.along_time ? a.dx.t == 1 && tokens >= vector : a.dx.d == 1 && block.channels >= vector;
  const bool direct = contiguous && !adds_dfinal && !run.padding;
  if (!direct) {
    if (run.padding) block.clear(tile, tokens);
    for (int64_t c = 0; c < block.lanes && !run.padding; c += vector)
      lines.dx_staged(
          dpre + c, tile + c, block.tap, block.step, block.step, block.steps(tokens), filter + c, block.pitch);
    add_dfinal(block, run, piece.begin, piece.end, tile);
    return block.unstage(a.dx, run.row, piece.begin, tile, tokens);
  }
  T* dx = block.element(a.dx, run.row, piece.begin);
  if (a.along_time) {
    lines.dx_direct(dpre, dx, 1, vector, vector, tokens / vector, filter, block.pitch);
    const int64_t last = tokens - vector;  // again overlapping
    if (tokens % vector) lines.dx_direct(dpre + last, dx + last, 1, 0, 0, 1, filter, block.pitch);
    return;
  }
  for (int64_t c = 0; c < block.channels; c += vector) {
    const int64_t lane = c + vector <= block.channels ? c : block.channels - vector;
    lines.dx_direct(dpre + lane, dx + lane, block.tap, block.step, a.dx.t, tokens, filter + lane, block.pitch);
  }
}

template <class T, class F>
void backward_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece) {
  F* dpre = block.l1.y;
  if (!run.padding) dpre_piece(block, lines, run, piece, dpre);
  if (run.initial >= 0 && piece.begin == run.begin) dinitial_of_run(block, run, dpre, block.l1.x);
  dx_piece(block, lines, run, piece, dpre);
}

// Parameter gradients of one group: of its block's channels, or the lanes of its one channel added up.
template <class T, class F>
void store_partials(const ConvArgs& a, Block<T>& block, int64_t group) {
  F* out = static_cast<F*>(a.partials) + (group * a.channels + block.first) * (a.width + 1);
  for (int64_t c = 0; c < block.channels; ++c)
    for (int64_t k = 0; k <= a.width; ++k) {
      const F* sums = block.l1.sums + k * block.pitch + c;
      *out++ = a.along_time ? sum_of<F>(load(sums)) : *sums;
    }
}

template <class F>
void add_partials(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; ++d)
    for (int64_t k = 0; k <= a.width; ++k) {
      double total = 0;
      for (int64_t g = 0; g < a.group_count; ++g)
        total += static_cast<const F*>(a.partials)[(g * a.channels + d) * (a.width + 1) + k];
      if (k < a.width) *at<F>(a.dweight.data, d * a.dweight.d + k * a.dweight.t) = F(total);
      else if (a.dbias.data) *at<F>(a.dbias.data, d * a.dbias.d) = F(total);
    }
}

// An empty packed sequence has no tile: its final state is its initial one.
template <class T>
void dinitial_of_empty_runs(const ConvArgs& a, Block<T>& block) {
  for (int64_t r = 0; r < a.run_count; ++r)
    if (a.runs[r].begin == a.runs[r].end && a.runs[r].initial >= 0)
      dinitial_of_run(block, a.runs[r], block.l1.y, block.l1.x);
}

template <class T, bool backward>
void run(const ConvArgs& a) {
  using F = Compute<T>;
  const Lines<T> lines = lines_for<T>(a.width, a.silu);
  const int64_t blocks = a.along_time ? a.channels : (a.channels + kConvBlock - 1) / kConvBlock;
  parallel_if(a.parallel, a.group_count * blocks, [&](int64_t begin, int64_t end) {
    Scratch<F> l1;
    if (!a.along_time) zero(l1.x, kTileSize), zero(l1.y, kTileSize), zero(l1.filter, sizeof l1.filter / sizeof(F));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / blocks;
      Block<T> block(a, l1, unit % blocks);
      if (backward) zero(l1.sums, (a.width + 1) * block.pitch);
      for (int64_t p = a.groups[group]; p < a.groups[group + 1]; ++p) {
        const ConvPiece& piece = a.pieces[p];
        if (backward) backward_piece<T, F>(block, lines, a.runs[piece.run], piece);
        else forward_piece<T>(block, lines, a.runs[piece.run], piece);
      }
      if (backward) store_partials<T, F>(a, block, group);
    }
  });
  parallel_if(a.parallel, blocks, [&](int64_t begin, int64_t end) {
    Scratch<F> l1;
    for (int64_t index = begin; index < end; ++index) {
      Block<T> block(a, l1, index);
      if (backward) dinitial_of_empty_runs(a, block);
      else final_states(a, block);
    }
  });
  if (backward)
    parallel_if(a.parallel, a.channels, [&](int64_t begin, int64_t end) { add_partials<F>(a, begin, end); });
}

template <bool backward>
void with_dtype(const ConvArgs& a) {
  switch (a.dtype) {  // the order of enum Dtype
    case 0: return run<float, backward>(a);
    case 1: return run<double, backward>(a);
    case 2: return run<f16, backward>(a);
    case 3: return run<bf16, backward>(a);
  }
}

}  // namespace

namespace scalekern::SCALEKERN_ISA {

void conv1d_fwd(const ConvArgs& a) { with_dtype<false>(a); }
void conv1d_bwd(const ConvArgs& a) { with_dtype<true>(a); }

}  // namespace scalekern::SCALEKERN_ISA
