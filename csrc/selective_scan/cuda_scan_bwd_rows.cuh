// Backward selective scan of plain rows (cuda_scan_rows.cuh says when): the fast one.
//
// Bound, by count: issue slots, some 320 instructions a token and lane, 640 a token of 32 channels: 2.6 ms at B8 D4096
// N16 L4096 on an H200, the special-function unit 2.0 ms (3.5 x 16 exponentials a token: states up to the bounds of the
// groups, up to the middle of a group, within four tokens, and decays on the way back), memory 0.5 ms.
// Measured there: 6.84 ms with the reductions, 1.33 times mamba_ssm 2.3.2, so 60 % of the issue slots are empty. Three
// variants with other bounds came out alike (below), which leaves the loads: u, dout and z come three, two and two
// times, 8 bytes a row each, and are waited for at once, where the forward fetches whole groups of 8 one group ahead
// (what gained it a quarter). To be tried next.
//
// Split: two lanes a channel (l, l ^ 16), 8 states each; a warp 16 channels, a block 64; 128 threads. Tokens from the
// last tile of 64 to the first: up the tile from its checkpoint, leaving the states on entering each group of 8 in
// shared memory; then group by group back down, four tokens at a time, whose 4 x 8 states stay in registers.
// Where that does not fill the GPU, time is split too: the adjoint of every chunk but the first is swept once from zero
// (kLocal), JoinAdjoints carries it across chunks with exp(A sum d), and the sweep proper begins each chunk with it.
// At B1 D1536 L16384 that takes 1.34 ms in place of 12.1 (mamba_ssm: 1.96).
//
// dB and dC are sums over channels. Tensor cores do the first step: 16 values of a lane are summed over the four lanes
// of its quad by four products with ones, placed so that every lane ends up with 4 of the 16 (quad_sums; the terms are
// cut to tf32 for 2-byte types, split in two for float). Exchanges finish the warp's 16 channels. The sums take the
// place of saved states that are used up, and at the end of the tile the block adds its warps' and leaves them in its
// slot of the partial buffer (cuda_scan_reduce.cuh).
//
// Tried, in ms at the shape above: the general kernel 15.6; decays kept in registers beside the states, states saved
// every four tokens, products chained 6.87; decays computed twice, products independent, four blocks an SM (the whole
// shape in one wave, but 820 bytes spilled) 7.24, three blocks 6.63.
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

// Lane q of every four gets the sums over the four of x[4 q .. 4 q + 3]. even: 1 in the lanes whose lane / 4 is even.
template <bool kExact>
SK_DEVICE void quad_sums(const float (&x)[16], float even, float (&sums)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float high[4], low[4], sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = kExact ? __uint_as_float(__float_as_uint(x[4 * i + k]) & 0xffffe000u) : x[4 * i + k];
      low[k] = x[4 * i + k] - high[k];
    }
    tf32_product(sum, high, even, 1.0f - even);
    if constexpr (kExact) tf32_product(sum, low, even, 1.0f - even);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = i == 0 || thread_index() % 4 == i ? sum[k] : sums[k];
  }
}

#else

template <bool kExact>
inline void quad_sums(const float (&x)[16], float, float (&sums)[4]) {
  for (int i = 0; i < 16; ++i) {
    float sum = x[i] + shuffle_xor(x[i], 1);
    sum += shuffle_xor(sum, 2);
    if (thread_index() % 4 == i / 4) sums[i % 4] = sum;
  }
}

#endif

template <class T, bool kReverse, bool kLocal>
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
  static constexpr int kPiece = kStates * 32;
  // In floats: B and C of a tile, then for each warp the states of 32 lanes on entering each of 8 groups, and one piece
  // more: the sums of a group's 8 tokens take the place of the states of the group after it, which are used up.
  static constexpr int kPieces = kRowTokens / kGroup + 1;
  static constexpr int kSharedBytes = int(sizeof(F)) * (2 * kRowTokens * kRowStates + kWarps * kPieces * kPiece);
  static_assert(kPiece == kGroup * kWidth);

  struct Walk {
    F A[kStates], g[kStates], dA[kStates];
    F D, bias, dD, dbias;
    F even;  // 1 where lane / 4 is even
    int64_t u, delta, z, dout, du, ddelta, dz;  // where the channel's row begins
    bool active;
  };

  // Where this thread works.
  struct Place {
    int64_t batch, chunk, slot, channel;
    Channels block;
    int half;  // which 8 of the states
    bool active;

    SK_FN int64_t row(const Args& a) const { return (batch * a.chunks + chunk) * a.p.channels + channel; }
  };

  static SK_DEVICE Place place_of(const Args& a) {
    const int64_t skipped = kLocal ? 1 : 0, scanned = a.chunks - skipped;  // nothing comes before the first chunk
    Place w{};
    w.chunk = block_index() % scanned + skipped, w.slot = block_index() / scanned;
    w.batch = w.slot / a.p.channel_blocks();
    w.block = channels_of(a.p, w.slot % a.p.channel_blocks());
    const int lane = thread_index() % 32, row = thread_index() / 32 * 16 + lane % 16;
    w.half = lane / 16;
    w.active = row < w.block.count;
    w.channel = w.block.first + (w.active ? row : 0);
    return w;
  }

  static SK_DEVICE F* tile_B() { return reinterpret_cast<F*>(shared_memory()); }
  static SK_DEVICE F* tile_C() { return tile_B() + kRowTokens * kRowStates; }
  static SK_DEVICE F* piece(int i, int warp = thread_index() / 32) {
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
    const F* entry = static_cast<const F*>(a.entry) + place.row(a) * a.p.states;
    if (kLocal) load_states(a, place, nullptr, 0, w.g);
    else if (a.chunks > 1) load_states(a, place, entry, 1, w.g);
    else load_states(a, place, row_of(a.dlast, place), a.dlast.n, w.g);
    if (a.p.D.p) w.D = static_cast<const F*>(a.p.D.p)[place.channel * a.p.D.d];
    if (a.p.bias.p) w.bias = static_cast<const F*>(a.p.bias.p)[place.channel * a.p.bias.d];
    w.even = thread_index() / 4 % 2 == 0 ? F(1) : F(0);
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

  // One token up.
  static SK_DEVICE void advance_states(const Walk& w, const F* Bs, int j, F step, F du, F (&h)[kStates]) {
    F B[kStates];
    load_matrix(Bs, j, B);
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = advance(exp2_unit(step * w.A[i]), h[i], du, B[i]);
  }

  // Up the tile, leaving the states on entering each group in shared memory.
  static SK_DEVICE void advance_tile(const Args& a, const Walk& w, const Tile& tile, int half, F (&h)[kStates]) {
#pragma unroll 1
    for (int g = 0;; ++g) {
      F* own = piece(g) + thread_index() % 32;
#pragma unroll
      for (int i = 0; i < kStates; ++i) own[i * 32] = h[i];
      if (g == tile.groups - 1) return;
      const int first = tile.place(g) * kGroup;
      F step[kGroup], du[kGroup];
      load_steps(a, w, tile.t0 + first, step, du);
      const F* Bs = tile_B() + first * kRowStates + kStates * half;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) advance_states(w, Bs, j, step[j], du[j], h);
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
      const uint32_t low = kReverse ? narrow_pair<T>(x[3], x[2]) : narrow_pair<T>(x[0], x[1]);
      const uint32_t high = kReverse ? narrow_pair<T>(x[1], x[0]) : narrow_pair<T>(x[2], x[3]);
      *reinterpret_cast<uint64_t*>(to) = uint64_t(high) << 32 | low;
    } else {
      *reinterpret_cast<Four*>(to) = kReverse ? Four{x[3], x[2], x[1], x[0]} : Four{x[0], x[1], x[2], x[3]};
    }
  }

  // What finish_group needs: sums over the states of C h, g B and g h A decay. First of this lane's 8 states at the
  // later four tokens, then, as the earlier four come, of all 16 states at the four that this lane finishes.
  struct Sums {
    F y[kSteps], gB[kSteps], gA[kSteps];

    SK_DEVICE void join(bool upper, int j, F y_early, F gB_early, F gA_early) {
      const auto exchange = [&](F& late, F early) {
        late = (upper ? late : early) + shuffle_xor(upper ? early : late, 16);
      };
      exchange(y[j], y_early), exchange(gB[j], gB_early), exchange(gA[j], gA_early);
    }
  };

  // exp(step A) once more: written so that the compiler does not keep the first one, for which there is no room.
  static SK_DEVICE F decay_again(F step, F A) {
#if defined(__CUDA_ARCH__)
    F product;
    asm("fma.rn.f32 %0, %1, %2, 0f00000000;" : "=f"(product) : "f"(step), "f"(A));
    return exp2_unit(product);
#else
    return exp2_unit(step * A);
#endif
  }

  // u of four tokens times their step sizes; zeros in lanes without a channel, whose sums must not count.
  static SK_DEVICE void load_du(const Args& a, const Walk& w, int64_t t, const F* step, F (&du)[kSteps]) {
    load_four(a.p.u.p, w.u + t, du);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) du[j] = w.active ? du[j] * step[j] : F(0);
  }

  // Four tokens, backward in time: their states first, then the adjoint g.
  template <int kFirst>
  static SK_DEVICE void sweep_four(
      const Args& a, Walk& w, const Tile& tile, int half, int g, const F (&steps)[kGroup], Sums& s) {
    const int first = tile.place(g) * kGroup;
    const int64_t t = tile.t0 + first;
    const auto place = [&](int four) { return t + ((four != 0) != kReverse ? kSteps : 0); };
    const F* Bs = tile_B() + first * kRowStates + kStates * half;
    const F* Cs = tile_C() + first * kRowStates + kStates * half;
    F states[kSteps + 1][kStates], du[kSteps], dy[kSteps];  // states on entering each token, and at the end
#pragma unroll
    for (int i = 0; i < kStates; ++i) states[0][i] = piece(g)[i * 32 + thread_index() % 32];
    if constexpr (kFirst != 0) {
      load_du(a, w, place(0), steps, du);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) advance_states(w, Bs, j, steps[j], du[j], states[0]);
    }
    load_du(a, w, place(kFirst), steps + kFirst, du);
    load_four(a.dout.p, w.dout + place(kFirst), dy);
    if (a.p.z.p) {
      F z[kSteps];
      load_four(a.p.z.p, w.z + place(kFirst), z);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) dy[j] *= silu(z[j]);
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      dy[j] = w.active ? dy[j] : F(0);
#pragma unroll
      for (int i = 0; i < kStates; ++i) states[j + 1][i] = states[j][i];
      advance_states(w, Bs, kFirst + j, steps[kFirst + j], du[j], states[j + 1]);
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
        w.g[i] *= decay_again(step, w.A[i]);
        const F dE = w.g[i] * states[j][i];  // the gradient of step * A
        w.dA[i] = fused(dE, step, w.dA[i]);
        gA = fused(dE, w.A[i], gA);
      }
      add_channels(w, piece(g + 1) + (kReverse ? kGroup - 1 - at : at) * kWidth, half, x);
      if constexpr (kFirst != 0) s.y[j] = y, s.gB[j] = gB, s.gA[j] = gA;
      else s.join(half != 0, j, y, gB, gA);
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

  // dB and dC of one token, summed over the 16 channels of the warp, into its row of the sums.
  static SK_DEVICE void add_channels(const Walk& w, F* row, int half, const F (&x)[2 * kStates]) {
    const int lane = thread_index() % 32;
    F sums[4];
    quad_sums<sizeof(T) == 4>(x, w.even, sums);
    const bool high = lane & 4, odd = lane & 8;  // keep two of the four, then one
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const F keep = high ? sums[2 + i] : sums[i], give = high ? sums[i] : sums[2 + i];
      sums[i] = keep + shuffle_xor(give, 4);
    }
    const F keep = odd ? sums[1] : sums[0], give = odd ? sums[0] : sums[1];
    const int value = lane % 4 * 4 + (high ? 2 : 0) + (odd ? 1 : 0);  // of dB of 8 states, then dC of 8 states
    row[value / kStates * kRowStates + kStates * half + value % kStates] = keep + shuffle_xor(give, 8);
  }

  // Each of the two lanes of a channel finishes four tokens of the group.
  static SK_DEVICE void finish_group(
      const Args& a, Walk& w, int64_t t, int half, const F (&steps)[kGroup], const Sums& s) {
    const bool upper = half != 0;
    if (!w.active) return;
    const int64_t at = t + (upper != kReverse ? 4 : 0);
    F u[4], dout[4], du[4], ddelta[4], dz[4];
    load_four(a.p.u.p, w.u + at, u);
    load_four(a.dout.p, w.dout + at, dout);
    F z[4] = {};
    if (a.p.z.p) load_four(a.p.z.p, w.z + at, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const F step = upper ? steps[4 + i] : steps[i];
      F dy = dout[i];
      if (a.p.z.p) {
        const F gate = sigmoid(z[i]);
        dy *= z[i] * gate;
        dz[i] = dout[i] * fused(w.D, u[i], s.y[i]) * silu_slope(z[i], gate);
      }
      ddelta[i] = fused(s.gB[i], u[i], s.gA[i] * F(0.69314718055994530942));  // A is scaled by log2 e
      if (a.p.softplus) ddelta[i] *= softplus_slope(step);
      w.dbias += ddelta[i];
      w.dD = fused(dy, u[i], w.dD);
      du[i] = fused(s.gB[i], step, w.D * dy);
    }
    store_four(a.du.p, w.du + at, du);
    store_four(a.ddelta.p, w.ddelta + at, ddelta);
    if (a.p.z.p) store_four(a.dz.p, w.dz + at, dz);
  }

  // The tile's sums of all warps, in order, to this block's slot.
  static SK_DEVICE void store_sums(const Args& a, const Place& place, const Tile& tile) {
    F* to = static_cast<F*>(a.partial) + (place.slot * a.p.length + tile.t0) * kWidth;
    const int count = tile.groups * kGroup * kWidth;
    for (int i = 4 * thread_index(); i < count; i += 4 * kThreads) {
      // Pieces lie in the order of the scan, tokens within them in the order of memory.
      const int g = tile.place(i / kPiece);
      Quad<F> sum{};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const Quad<F> x = load_quad(piece(g + 1, warp) + i % kPiece);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.v[e] += x.v[e];
      }
      store_quad(to + i, sum);
    }
  }

  static SK_DEVICE void save_parameter_gradients(const Args& a, const Place& place, Walk& w) {
    const int64_t row = place.row(a);
    save_states(a, place, static_cast<F*>(a.dA) + row * a.p.states, 1, w.dA);
    w.dD += shuffle_xor(w.dD, 16), w.dbias += shuffle_xor(w.dbias, 16);
    if (!w.active || place.half != 0) return;
    static_cast<F*>(a.dD)[row] = w.dD;
    static_cast<F*>(a.dbias)[row] = w.dbias;
  }

  // What is left at the chunk's first token of an adjoint that is zero at its end, and the chunk's sum of step sizes.
  static SK_DEVICE void sweep_locally(const Args& a, Walk& w, const Tile& tile, int half, F& step_sum) {
#pragma unroll 1
    for (int g = tile.groups - 1; g >= 0; --g) {
      const int first = tile.place(g) * kGroup;
      F step[kGroup], dy[kGroup];
      load_row(static_cast<const T*>(a.p.delta.p) + w.delta + tile.t0 + first, kReverse, step);
      load_row(static_cast<const T*>(a.dout.p) + w.dout + tile.t0 + first, kReverse, dy);
      if (a.p.z.p) {
        F z[kGroup];
        load_row(static_cast<const T*>(a.p.z.p) + w.z + tile.t0 + first, kReverse, z);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) dy[j] *= silu(z[j]);
      }
#pragma unroll
      for (int j = kGroup - 1; j >= 0; --j) {
        step[j] = step_size(step[j], w.bias, a.p.softplus);
        step_sum += step[j];
        F C[kStates];
        load_matrix(tile_C() + first * kRowStates + kStates * half, j, C);
#pragma unroll
        for (int i = 0; i < kStates; ++i) w.g[i] = fused(C[i], dy[j], w.g[i]) * exp2_unit(step[j] * w.A[i]);
      }
    }
  }

  static SK_DEVICE void run(const Args& a) {
    const Place place = place_of(a);
    Walk w = begin_walk(a, place);
    F step_sum = 0;
    const int64_t tiles = (a.p.length + kRowTokens - 1) / kRowTokens;
    const int64_t begin = place.chunk * a.chunk_tiles,
                  end = begin + a.chunk_tiles < tiles ? begin + a.chunk_tiles : tiles;
#pragma unroll 1
    for (int64_t i = end - 1; i >= begin; --i) {  // in scan order, from the last
      const int64_t slot = kReverse ? tiles - 1 - i : i, left = a.p.length - slot * kRowTokens;
      const Tile tile{slot * kRowTokens, int(left < kRowTokens ? left : kRowTokens) / kGroup};
      MatrixShare<T> share;
      share.fetch(a.p, a.p.C, place.batch, place.block.first, tile.t0);
      share.store(tile_C());
      if constexpr (kLocal) {
        sync_threads();
        sweep_locally(a, w, tile, place.half, step_sum);
      } else {
        share.fetch(a.p, a.p.B, place.batch, place.block.first, tile.t0);
        share.store(tile_B());
        F h[kStates];
        load_states(a, place, checkpoint<F>(a.p, place.batch, slot, place.channel), 1, h);
        sync_threads();
        advance_tile(a, w, tile, place.half, h);
#pragma unroll 1
        for (int g = tile.groups - 1; g >= 0; --g) sweep_group(a, w, tile, place.half, g);
        sync_threads();
        store_sums(a, place, tile);
      }
      sync_threads();
    }
    if constexpr (kLocal) {
      F* before = static_cast<F*>(a.entry) + (place.row(a) - a.p.channels) * a.p.states;  // of the chunk before
      save_states(a, place, before, 1, w.g);
      if (w.active && place.half == 0) static_cast<F*>(a.step_sum)[place.row(a)] = step_sum;
    } else {
      save_parameter_gradients(a, place, w);
      if (a.dinitial.p && place.chunk == 0) save_states(a, place, row_of(a.dinitial, place), a.dinitial.n, w.g);
    }
  }
};

// Turns what ScanBwdRows<.., true> left of zero adjoints into the adjoints on entering each chunk from its end.
struct JoinAdjoints {
  using F = float;
  using Args = BwdArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;

  static SK_DEVICE void run(const Args& a) {
    const int64_t i = block_index() * kThreads + thread_index(), states = a.p.states;
    if (i >= a.p.batch * a.p.channels * states) return;
    const int64_t n = i % states, channel = i / states % a.p.channels, batch = i / states / a.p.channels;
    const F A = scaled_A(static_cast<const F*>(a.p.A.p)[channel * a.p.A.d + n * a.p.A.n]);
    const auto row = [&](int64_t chunk) { return (batch * a.chunks + chunk) * a.p.channels + channel; };
    const States& s = a.dlast;
    F g = s.p ? static_cast<const F*>(s.p)[batch * s.s + channel * s.d + n * s.n] : F(0);
    F* entry = static_cast<F*>(a.entry) + n;
    entry[row(a.chunks - 1) * states] = g;
    for (int64_t chunk = a.chunks - 1; chunk > 0; --chunk) {
      F& before = entry[row(chunk - 1) * states];
      before = g = fused(exp2_unit(A * static_cast<const F*>(a.step_sum)[row(chunk)]), g, before);
    }
  }
};

}  // namespace scalekern::scan
