// Backward selective scan of plain rows (cuda_scan_rows.cuh says when): the fast one.
//
// Bound: issue slots and the special-function unit alike. A token of a channel takes 3 x 16 exponentials (states to the
// group's bounds, states within a group, decays on the way back: keeping 8 x 8 decays in registers beside the states
// would cost half of the warps) and 11 for step sizes and gates, 59 unit operations or 472 cycles of a scheduler a warp;
// by count some 480 instructions. Together at best 2.0 ms at B8 D4096 N16 L4096 on an H200. Memory is a tenth of that.
//
// Split: two lanes a channel (l and l ^ 16), 8 states each; a warp 16 channels, a block 64; 128 threads. Tokens from the
// last tile of 64 to the first: up the tile from its checkpoint, leaving the states on entering each group of 8 in
// shared memory, then group by group back down, 8 x 8 states in registers.
//
// dB and dC are sums over channels. Tensor cores do the first step: 16 values of a lane are summed over the four lanes
// of its quad by four products with ones, exactly placed so that every lane ends up with 4 of the 16 (quad_sums; the
// terms are cut to tf32 for 2-byte types, split in two for float). Two exchanges finish the warp's 16 channels: 18
// instructions a token where shuffles alone took 60. The sums take the place of the group's saved states, and at the
// end of the tile the block adds its warps' and leaves them in its slot of the partial buffer (cuda_scan_reduce.cuh).
//
// The general kernel (cuda_scan_bwd.cuh), which this replaces here, took 15.6 ms on an H200: 1,585 instructions a token
// of 32 channels at 0.47 a clock, 150 each to stage and store through shared memory, and spills.
#pragma once
#include "selective_scan/cuda_scan_bwd.cuh"
#include "selective_scan/cuda_scan_rows.cuh"

namespace scalekern::scan {

#if defined(__CUDACC__)

SK_DEVICE void tf32_product(float (&sum)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Lane q of every four gets the sums over the four of x[4 q .. 4 q + 3]. ones[2 i + h]: 1 where lane / 4 = 2 i + h.
template <bool kExact>
SK_DEVICE void quad_sums(const float (&x)[16], const float (&ones)[8], float (&sums)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[k] = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = kExact ? __uint_as_float(__float_as_uint(x[4 * i + k]) & 0xffffe000u) : x[4 * i + k];
      low[k] = x[4 * i + k] - high[k];
    }
    tf32_product(sums, high, ones[2 * i], ones[2 * i + 1]);
    if constexpr (kExact) tf32_product(sums, low, ones[2 * i], ones[2 * i + 1]);
  }
}

#else

template <bool kExact>
inline void quad_sums(const float (&x)[16], const float (&)[8], float (&sums)[4]) {
  for (int i = 0; i < 16; ++i) {
    float sum = x[i] + shuffle_xor(x[i], 1);
    sum += shuffle_xor(sum, 2);
    if (thread_index() % 4 == i / 4) sums[i % 4] = sum;
  }
}

#endif

template <class T, bool kReverse>
struct ScanBwdRows {
  using F = float;
  using Args = BwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 3;
  static constexpr int kStates = 8;
  static constexpr int kChannels = kThreads / 2;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWidth = 2 * kRowStates;  // dB and dC of a token
  static constexpr int kSteps = 4;  // tokens whose states stay in registers
  static constexpr int kPieces = kRowTokens / kSteps;
  // In floats: B and C of a tile, then for each warp and four tokens 8 states of 32 lanes, later the tokens' sums.
  static constexpr int kPiece = kStates * 32;
  static constexpr int kSharedBytes = int(sizeof(F)) * (2 * kRowTokens * kRowStates + kWarps * kPieces * kPiece);
  static_assert(kPiece == kSteps * 2 * kWidth);

  struct Walk {
    F A[kStates], g[kStates], dA[kStates];
    F D, bias, dD, dbias;
    F ones[8];
    int64_t u, delta, z, dout, du, ddelta, dz;  // where the channel's row begins
    bool active;
  };

  // Where this thread works.
  struct Place {
    int64_t batch, channel;
    Channels block;
    int half;  // which 8 of the states
    bool active;
  };

  static SK_DEVICE Place place_of(const Args& a) {
    const int64_t blocks = a.p.channel_blocks();
    Place w{};
    w.batch = block_index() / blocks;
    w.block = channels_of(a.p, block_index() % blocks);
    const int lane = thread_index() % 32, row = thread_index() / 32 * 16 + lane % 16;
    w.half = lane / 16;
    w.active = row < w.block.count;
    w.channel = w.block.first + (w.active ? row : 0);
    return w;
  }

  static SK_DEVICE F* tile_B() { return reinterpret_cast<F*>(shared_memory()); }
  static SK_DEVICE F* tile_C() { return tile_B() + kRowTokens * kRowStates; }
  static SK_DEVICE F* piece(int i, int warp = thread_index() / 32) {  // the i-th four tokens in scan order
    return tile_C() + kRowTokens * kRowStates + (warp * kPieces + i) * kPiece;
  }

  static SK_DEVICE void load_states(const Args& a, const Place& w, const F* row, int64_t stride, F (&x)[kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = kStates * w.half + i;
      x[i] = w.active && row != nullptr && n < a.p.states ? row[n * stride] : F(0);
    }
  }

  static SK_DEVICE void save_states(const Args& a, const Place& w, F* row, int64_t stride, const F (&x)[kStates]) {
    if (!w.active) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = kStates * w.half + i;
      if (n < a.p.states) row[n * stride] = x[i];
    }
  }

  static SK_DEVICE F* row_of(const States& s, const Place& w) {
    return s.p ? static_cast<F*>(s.p) + w.batch * s.s + w.channel * s.d : nullptr;
  }

  static SK_DEVICE Walk begin_walk(const Args& a, const Place& place) {
    Walk w{};
    load_states(a, place, static_cast<const F*>(a.p.A.p) + place.channel * a.p.A.d, a.p.A.n, w.A);
#pragma unroll
    for (int i = 0; i < kStates; ++i) w.A[i] = scaled_A(w.A[i]);
    load_states(a, place, row_of(a.dlast, place), a.dlast.n, w.g);
    if (a.p.D.p) w.D = static_cast<const F*>(a.p.D.p)[place.channel * a.p.D.d];
    if (a.p.bias.p) w.bias = static_cast<const F*>(a.p.bias.p)[place.channel * a.p.bias.d];
#pragma unroll
    for (int i = 0; i < 8; ++i) w.ones[i] = thread_index() % 32 / 4 == i ? F(1) : F(0);
    const auto row = [&](const Sequences& s) { return place.batch * s.b + place.channel * s.d; };
    w.u = row(a.p.u), w.delta = row(a.p.delta), w.z = row(a.p.z), w.dout = row(a.dout);
    w.du = row(a.du), w.ddelta = row(a.ddelta), w.dz = row(a.dz);
    w.active = place.active;
    return w;
  }

  // Step sizes and d u of a group of tokens from t on; zeros in lanes without a channel, whose sums must not count.
  static SK_DEVICE void load_steps(const Args& a, const Walk& w, int64_t t, F (&step)[kGroup], F (&du)[kGroup]) {
    load_row(static_cast<const T*>(a.p.delta.p) + w.delta + t, kReverse, step);
    load_row(static_cast<const T*>(a.p.u.p) + w.u + t, kReverse, du);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      step[j] = step_size(step[j], w.bias, a.p.softplus);
      du[j] = w.active ? du[j] * step[j] : F(0);
    }
  }

  // This lane's 8 states of B or C at the group's j-th token.
  static SK_DEVICE void load_matrix(const F* group, int j, F (&x)[kStates]) {
    const F* from = group + (kReverse ? kGroup - 1 - j : j) * kRowStates;
#pragma unroll
    for (int q = 0; q < kStates; q += 4) {
      const Quad<F> quad = load_quad(from + q);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[q + e] = quad.v[e];
    }
  }

  // A tile: tokens [t0, t0 + 8 groups).
  struct Tile {
    int64_t t0;
    int groups;
    SK_FN int place(int g) const { return kReverse ? groups - 1 - g : g; }  // of group g in scan order
  };

  // Up the tile, leaving the states on entering each four tokens in shared memory.
  static SK_DEVICE void advance_tile(const Args& a, const Walk& w, const Tile& tile, int half, F (&h)[kStates]) {
#pragma unroll 1
    for (int g = 0; g < tile.groups; ++g) {
      const int first = tile.place(g) * kGroup;
      F step[kGroup], du[kGroup];
      load_steps(a, w, tile.t0 + first, step, du);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j % kSteps == 0) {
          F* own = piece(2 * g + j / kSteps) + thread_index() % 32;
#pragma unroll
          for (int i = 0; i < kStates; ++i) own[i * 32] = h[i];
        }
        F B[kStates];
        load_matrix(tile_B() + first * kRowStates + kStates * half, j, B);
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = advance(exp2_unit(step[j] * w.A[i]), h[i], du[j], B[i]);
      }
    }
  }

  // Four tokens of a row, in scan order.
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  static SK_DEVICE void load_four(const void* p, int64_t at, F (&x)[4]) {
    const Four four = *reinterpret_cast<const Four*>(static_cast<const T*>(p) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widen(kReverse ? four.v[3 - i] : four.v[i]);
  }
  static SK_DEVICE void store_four(void* p, int64_t at, const F (&x)[4]) {
    T* to = static_cast<T*>(p) + at;
    if constexpr (sizeof(T) == 2) {
      const uint32_t low = kReverse ? narrow_two<T>(x[3], x[2]) : narrow_two<T>(x[0], x[1]);
      const uint32_t high = kReverse ? narrow_two<T>(x[1], x[0]) : narrow_two<T>(x[2], x[3]);
      *reinterpret_cast<uint64_t*>(to) = uint64_t(high) << 32 | low;
    } else {
      *reinterpret_cast<Four*>(to) = kReverse ? Four{x[3], x[2], x[1], x[0]} : Four{x[0], x[1], x[2], x[3]};
    }
  }

  // What finish_group needs of a group's tokens: sums over the states of C h, g B and g h A decay.
  struct Sums {
    F y[kGroup], gB[kGroup], gA[kGroup];
  };

  // Four tokens, backward in time: their states first, then the adjoint g.
  template <int kFirst>
  static SK_DEVICE void sweep_four(
      const Args& a, Walk& w, const Tile& tile, int half, int g, const F (&steps)[kGroup], Sums& s) {
    const int first = tile.place(g) * kGroup;
    F* own = piece(2 * g + kFirst / kSteps);
    F states[kSteps + 1][kStates], decays[kSteps][kStates];  // states on entering each token, and at the end
#pragma unroll
    for (int i = 0; i < kStates; ++i) states[0][i] = own[i * 32 + thread_index() % 32];
    sync_warp();  // what was read makes place for the sums
    const int64_t t = tile.t0 + first + ((kFirst != 0) != kReverse ? kSteps : 0);
    F du[kSteps], dy[kSteps];
    load_four(a.p.u.p, w.u + t, du);
    load_four(a.dout.p, w.dout + t, dy);
    if (a.p.z.p) {
      F z[kSteps];
      load_four(a.p.z.p, w.z + t, z);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) dy[j] *= silu(z[j]);
    }
    const F* Bs = tile_B() + first * kRowStates + kStates * half;
    const F* Cs = tile_C() + first * kRowStates + kStates * half;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const F step = steps[kFirst + j];
      du[j] = w.active ? du[j] * step : F(0);  // lanes without a channel: their sums must not count
      dy[j] = w.active ? dy[j] : F(0);
      F B[kStates];
      load_matrix(Bs, kFirst + j, B);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        decays[j][i] = exp2_unit(step * w.A[i]);
        states[j + 1][i] = advance(decays[j][i], states[j][i], du[j], B[i]);
      }
    }
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const int at = kFirst + j;
      const F step = steps[at];
      F B[kStates], C[kStates], x[2 * kStates], y = 0, gB = 0, gA = 0;
      load_matrix(Bs, at, B);
      load_matrix(Cs, at, C);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const F h = states[j + 1][i];
        w.g[i] = fused(C[i], dy[j], w.g[i]);
        y = fused(C[i], h, y);
        x[i] = w.g[i] * du[j], x[kStates + i] = h * dy[j];
        gB = fused(w.g[i], B[i], gB);
        w.g[i] *= decays[j][i];
        const F dE = w.g[i] * states[j][i];  // the gradient of step * A
        w.dA[i] = fused(dE, step, w.dA[i]);
        gA = fused(dE, w.A[i], gA);
      }
      s.y[at] = y, s.gB[at] = gB, s.gA[at] = gA;
      add_channels(w, own + (kReverse ? kSteps - 1 - j : j) * 2 * kWidth, half, x);
    }
  }

  static SK_DEVICE void sweep_group(const Args& a, Walk& w, const Tile& tile, int half, int g) {
    const int64_t t = tile.t0 + tile.place(g) * kGroup;
    F steps[kGroup];
    load_row(static_cast<const T*>(a.p.delta.p) + w.delta + t, kReverse, steps);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) steps[j] = step_size(steps[j], w.bias, a.p.softplus);
    Sums sums;
    sweep_four<kSteps>(a, w, tile, half, g, steps, sums);
    sweep_four<0>(a, w, tile, half, g, steps, sums);
    finish_group(a, w, t, half, steps, sums);
  }

  struct alignas(8) Two {
    F v[2];
  };

  // dB and dC of one token, summed over the two 8 channels of the warp, into its two rows of the sums.
  static SK_DEVICE void add_channels(const Walk& w, F* row, int half, const F (&x)[2 * kStates]) {
    const int lane = thread_index() % 32;
    F sums[4];
    quad_sums<sizeof(T) == 4>(x, w.ones, sums);
    const bool high = lane & 4;  // keeps two of the four
    Two two;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const F keep = high ? sums[2 + i] : sums[i], give = high ? sums[i] : sums[2 + i];
      two.v[i] = keep + shuffle_xor(give, 4);
    }
    const int value = lane % 4 * 4 + (high ? 2 : 0);  // of dB of 8 states, then dC of 8 states
    row += (lane & 8) / 8 * kWidth + value / kStates * kRowStates + kStates * half + value % kStates;
    *reinterpret_cast<Two*>(row) = two;
  }

  // Each of the two lanes of a channel finishes four tokens of the group.
  static SK_DEVICE void finish_group(
      const Args& a, Walk& w, int64_t t, int half, const F (&steps)[kGroup], const Sums& s) {
    const bool upper = half != 0;
    F step[4], y[4], gB[4], gA[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto join = [&](const F(&x)[kGroup]) {
        return (upper ? x[4 + i] : x[i]) + shuffle_xor(upper ? x[i] : x[4 + i], 16);
      };
      step[i] = upper ? steps[4 + i] : steps[i];
      y[i] = join(s.y), gB[i] = join(s.gB), gA[i] = join(s.gA);
    }
    if (!w.active) return;
    const int64_t at = t + (upper != kReverse ? 4 : 0);
    F u[4], dout[4], du[4], ddelta[4], dz[4];
    load_four(a.p.u.p, w.u + at, u);
    load_four(a.dout.p, w.dout + at, dout);
    F z[4] = {};
    if (a.p.z.p) load_four(a.p.z.p, w.z + at, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      F dy = dout[i];
      if (a.p.z.p) {
        const F gate = sigmoid(z[i]);
        dy *= z[i] * gate;
        dz[i] = dout[i] * fused(w.D, u[i], y[i]) * silu_slope(z[i], gate);
      }
      ddelta[i] = fused(gB[i], u[i], gA[i] * F(0.69314718055994530942));  // A is scaled by log2 e
      if (a.p.softplus) ddelta[i] *= softplus_slope(step[i]);
      w.dbias += ddelta[i];
      w.dD = fused(dy, u[i], w.dD);
      du[i] = fused(gB[i], step[i], w.D * dy);
    }
    store_four(a.du.p, w.du + at, du);
    store_four(a.ddelta.p, w.ddelta + at, ddelta);
    if (a.p.z.p) store_four(a.dz.p, w.dz + at, dz);
  }

  // The tile's sums of all warps, in order, to this block's slot.
  static SK_DEVICE void store_sums(const Args& a, const Tile& tile) {
    F* to = static_cast<F*>(a.partial) + (block_index() * a.p.length + tile.t0) * kWidth;
    const int count = tile.groups * kGroup * kWidth, fours = 2 * tile.groups;
    for (int i = 4 * thread_index(); i < count; i += 4 * kThreads) {
      // Pieces lie in the order of the scan, tokens within them in the order of memory.
      const int four = i / (kSteps * kWidth), token = i / kWidth % kSteps, at = 2 * kWidth * token + i % kWidth;
      Quad<F> sum{};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const F* from = piece(kReverse ? fours - 1 - four : four, warp) + at;
        const Quad<F> x = load_quad(from), y = load_quad(from + kWidth);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.v[e] += x.v[e] + y.v[e];
      }
      store_quad(to + i, sum);
    }
  }

  static SK_DEVICE void save_parameter_gradients(const Args& a, const Place& place, Walk& w) {
    const int64_t row = place.batch * a.p.channels + place.channel;
    save_states(a, place, static_cast<F*>(a.dA) + row * a.p.states, 1, w.dA);
    w.dD += shuffle_xor(w.dD, 16), w.dbias += shuffle_xor(w.dbias, 16);
    if (!w.active || place.half != 0) return;
    static_cast<F*>(a.dD)[row] = w.dD;
    static_cast<F*>(a.dbias)[row] = w.dbias;
  }

  static SK_DEVICE void run(const Args& a) {
    const Place place = place_of(a);
    Walk w = begin_walk(a, place);
    const int64_t tiles = (a.p.length + kRowTokens - 1) / kRowTokens;
#pragma unroll 1
    for (int64_t i = tiles - 1; i >= 0; --i) {  // in scan order, from the last
      const int64_t slot = kReverse ? tiles - 1 - i : i, left = a.p.length - slot * kRowTokens;
      const Tile tile{slot * kRowTokens, int(left < kRowTokens ? left : kRowTokens) / kGroup};
      MatrixShare<T> share;
      share.fetch(a.p, a.p.B, place.batch, place.block.first, tile.t0);
      share.store(tile_B());
      share.fetch(a.p, a.p.C, place.batch, place.block.first, tile.t0);
      share.store(tile_C());
      F h[kStates];
      load_states(a, place, checkpoint<F>(a.p, place.batch, slot, place.channel), 1, h);
      sync_threads();
      advance_tile(a, w, tile, place.half, h);
#pragma unroll 1
      for (int g = tile.groups - 1; g >= 0; --g) sweep_group(a, w, tile, place.half, g);
      sync_threads();
      store_sums(a, tile);
      sync_threads();
    }
    save_parameter_gradients(a, place, w);
    if (a.dinitial.p) save_states(a, place, row_of(a.dinitial, place), a.dinitial.n, w.g);
  }
};

}  // namespace scalekern::scan
