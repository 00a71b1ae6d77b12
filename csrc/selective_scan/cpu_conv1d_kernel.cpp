// Short causal depthwise convolution, forward and backward.
//
// Bound: memory, 8 bytes an element in fp32 (4 in half precision), beside one exponential and one division for silu.
// Layout: a tile of one run goes to L1 as compute-type numbers, with the W - 1 tokens before it. Its lanes lie along
//   time (a tile is one channel, a tap further is one number further) or along channels (rows of kConvBlock channels,
//   a tap further is a row further). The loops over a tile know only the distances `tap` and `step`, so both layouts,
//   every storage type and every stride share them; filter, bias and parameter gradients stay in registers for a tile.
// Split: groups of kConvGroup tokens times blocks of channels, over threads. A tile reads its W - 1 tokens of halo
//   again instead of waiting for its neighbour; the backward recomputes the halo's pre-activations too.
// Backward, in place in the tile of dout: dpre = dout act'(pre), then dx. Parameter gradients are summed for a group,
//   then over the groups in order, in double: the same bits whatever the number of threads.
#include "selective_scan/conv1d.h"
#include "selective_scan/cpu_conv1d_line.h"

namespace {

using scalekern::ConvArgs;
using scalekern::ConvPiece;
using scalekern::ConvRun;
using scalekern::ConvTensor;
using scalekern::kConvBlock;
using scalekern::kConvBlockTile;
using scalekern::kConvTimeTile;

constexpr int64_t kHalo = kConvMaxWidth - 1;
// A tile with both halos and one vector of slack, in either layout.
constexpr int64_t kTileSize = (kConvBlockTile + 2 * kHalo) * kConvBlock + 64;
static_assert(kTileSize >= kConvTimeTile + 2 * kHalo + 64);

// What a thread works in.
template <class F>
struct Scratch {
  alignas(64) F x[kTileSize], y[kTileSize];
  alignas(64) F filter[(kConvMaxWidth + 1) * kConvBlock], sums[(kConvMaxWidth + 1) * kConvBlock];  // taps, then bias
};

// --- the loops over a tile in L1, as in cpu_conv1d_line.h ---

template <bool silu, class F>
static inline Vec<F> through_activation(Vec<F> dout, Vec<F> pre) {
  if (!silu) return dout;
  const Vec<F> gate = 1 / one_plus_exp_minus(pre);
  return dout * gate * (1 + pre * (1 - gate));
}

// dout becomes dpre; the first `steps` vectors add to the parameter gradients, the rest is halo.
template <int W, bool silu, class F>
void dpre_line(
    const F* x, F* dy, int64_t tap, int64_t step, int64_t steps, int64_t steps_with_halo, const F* filter, F* sums,
    int64_t pitch) {
  Vec<F> w[W], dw[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch), dw[k] = load(sums + k * pitch);
  const Vec<F> bias = load(filter + W * pitch);
  Vec<F> dbias = load(sums + W * pitch);
  const auto dpre_at = [&](int64_t s, Vec<F>* taps) {
    Vec<F> pre = bias;
    for (int k = 0; k < W; ++k) taps[k] = load(x + s * step + k * tap), pre += w[k] * taps[k];
    const Vec<F> dpre = through_activation<silu, F>(load(dy + s * step), pre);
    store(dy + s * step, dpre);
    return dpre;
  };
  Vec<F> taps[W];
  for (int64_t s = 0; s < steps; ++s) {
    const Vec<F> dpre = dpre_at(s, taps);
    for (int k = 0; k < W; ++k) dw[k] += dpre * taps[k];
    dbias += dpre;
  }
  for (int64_t s = steps; s < steps_with_halo; ++s) dpre_at(s, taps);
  for (int k = 0; k < W; ++k) store(sums + k * pitch, dw[k]);
  store(sums + W * pitch, dbias);
}

// dpre becomes dx: dx[t] needs dpre from t on, so ascending order may overwrite.
template <int W, class F>
void dx_line(F* dy, int64_t tap, int64_t step, int64_t steps, const F* filter, int64_t pitch) {
  Vec<F> w[W];
  for (int k = 0; k < W; ++k) w[k] = load(filter + k * pitch);
  for (int64_t s = 0; s < steps; ++s, dy += step) {
    Vec<F> dx = w[W - 1] * load(dy);
    for (int k = W - 2; k >= 0; --k) dx += w[k] * load(dy + (W - 1 - k) * tap);
    store(dy, dx);
  }
}

template <class T, class F = Compute<T>>
struct Lines {
  ForwardLine<F> forward;  // from tile to tile
  ForwardLine<T> direct;   // from memory to memory
  decltype(&dpre_line<2, false, F>) dpre;
  decltype(&dx_line<2, F>) dx;
};

template <class T, int W = 2, class F = Compute<T>>
Lines<T> lines_for(int64_t width, bool silu) {
  if constexpr (W < kConvMaxWidth) {
    if (width > W) return lines_for<T, W + 1>(width, silu);
  }
  return {
      forward_line_for<F>(width, silu), forward_line_for<T>(width, silu),
      silu ? &dpre_line<W, true, F> : &dpre_line<W, false, F>, &dx_line<W, F>};
}

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
    lines.forward(l1.x + c, l1.y + c, block.tap, block.step, block.step, steps, l1.filter + c, block.pitch);
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
    lines.direct(x, out, 1, vector, vector, lanes / vector, block.l1.filter, block.pitch);
    if (lanes % vector)
      lines.direct(x + lanes - vector, out + lanes - vector, 1, 0, 0, 1, block.l1.filter, block.pitch);
    return;
  }
  for (int64_t c = 0; c < lanes; c += vector) {
    const int64_t at = c + vector <= lanes ? c : lanes - vector;
    lines.direct(x + at, out + at, a.x.t, a.x.t, a.out.t, end - begin, block.l1.filter + at, block.pitch);
  }
}

template <class T>
void forward_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece) {
  const ConvArgs& a = block.a;
  if (run.padding) {
    block.clear(block.l1.y, piece.end - piece.begin);
    return block.unstage(a.out, run.row, piece.begin, block.l1.y, piece.end - piece.begin);
  }
  int64_t direct = piece.begin;  // first token whose history lies in x
  if (direct < run.begin + a.width - 1) direct = run.begin + a.width - 1;
  if (a.along_time) direct = piece.begin + block.steps(direct - piece.begin) * block.vector;
  const bool possible = a.along_time ? a.x.t == 1 && a.out.t == 1 && direct + block.vector <= piece.end
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
  for (int64_t i = 0; i < a.width - 1; ++i)
    for (int64_t k = i < tokens ? 0 : i - tokens + 1; k <= i; ++k)
      for (int64_t c = 0; c < block.channels; ++c)
        tile[i * block.tap + c] += block.l1.filter[k * block.pitch + c] * dpre[(i - k) * block.tap + c];
  add_dfinal(block, run, run.begin - (a.width - 1), run.begin, tile);
  block.unstage(a.dinitial, run.initial, 0, tile, a.width - 1);
}

template <class T, class F>
void backward_piece(Block<T>& block, const Lines<T>& lines, const ConvRun& run, const ConvPiece& piece) {
  const ConvArgs& a = block.a;
  Scratch<F>& l1 = block.l1;
  const int64_t tokens = piece.end - piece.begin, after = run.end - piece.end;
  const int64_t halo = run.padding ? 0 : after < a.width - 1 ? after : a.width - 1, total = tokens + halo;
  // Behind the last token: zeros, up to the end of its vector and over the taps of dx.
  const int64_t slack = a.along_time ? kLanes<F> + kHalo : kHalo;
  if (run.padding) {
    block.clear(l1.y, tokens + slack);
  } else {
    block.stage_x(l1.x, run, piece.begin, piece.end + halo);
    if (a.along_time) zero(l1.x + a.width - 1 + total, kLanes<F>);
    block.stage(l1.y, a.dout, run.row, piece.begin, total);
    block.clear(l1.y + total * block.tap, slack);
    for (int64_t c = 0; c < block.lanes; c += kLanes<F>)
      lines.dpre(
          l1.x + c, l1.y + c, block.tap, block.step, block.steps(tokens), block.steps(total), l1.filter + c, l1.sums + c,
          block.pitch);
  }
  if (run.initial >= 0 && piece.begin == run.begin) dinitial_of_run(block, run, l1.y, l1.x);
  if (!run.padding)
    for (int64_t c = 0; c < block.lanes; c += kLanes<F>)
      lines.dx(l1.y + c, block.tap, block.step, block.steps(tokens), l1.filter + c, block.pitch);
  add_dfinal(block, run, piece.begin, piece.end, l1.y);
  block.unstage(a.dx, run.row, piece.begin, l1.y, tokens);
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
