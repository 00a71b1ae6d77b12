// Backward selective scan of plain rows (cuda_scan_rows.cuh says when): the fast one.
//
// Bound, counted in the code for sm_90a, bf16, gated, with softplus: issue slots, 268 instructions a token and lane (46
// up, 222 down), 2.2 ms at B8 D4096 N16 L4096 on an H200; the special-function unit close behind, 29 operations, 1.9 ms
// (3.4 x 8 exponentials: states up to the bounds of the groups, up to the middle of a group, within four tokens, and
// decays on the way back; step sizes twice, gates once, both shared by a channel's two lanes); memory 0.5 ms.
//
// Split: two lanes a channel (l, l ^ 16), 8 states each; a warp 16 channels, a block 64; 128 threads. Tokens from the
// last tile of 64 to the first: up the tile from its checkpoint, leaving the states on entering each group of 8 in
// shared memory; then group by group back down, four tokens at a time, whose 4 x 8 states stay in registers.
// Three blocks an SM hold 168 registers a thread and 60 KB each (68 in float; sm_80 has room for two such blocks).
// Where blocks leave places of the GPU empty, those of the last wave are split over time (cuda_scan_bwd_chunks.cuh).
//
// Loads: u, delta, dout and z of a group come by asynchronous copies one group ahead, across tiles too, one or two of
// 16 bytes a lane, the first of a tile with the line around it. Each lane prepares four of a group's eight tokens (step
// size, d u, dy, gate) for both of its channel. dB and dC: cuda_scan_bwd_sums.cuh; the warps' sums take the place of
// saved states that are used up, and at the end of the tile the block adds them and leaves them in its slot of the
// partial buffer (cuda_scan_reduce.cuh).
//
// Measured on an H200 in the form before this one (295 instructions): 6.84 ms at the shape above with the reductions,
// 1.33 times mamba_ssm 2.3.2; at B1 D1536 L16384 1.34 ms (12.1 without a split of time, mamba_ssm 1.96). A replay of
// its machine code on a model of one scheduler (stall counts, barriers, latencies of each pipe) takes 5.0 to 6.8 ms
// with global loads of 40 to 800 cycles; at 500, 3.5 for the wave of 396 blocks that the GPU holds and 2.5 for the
// other 116, one an SM. What stood still in it, and does no more:
// - step sizes had a branch a token: eight chains of some 100 cycles in turn, twice a group; now four at once;
// - a token's sums were stored before the next token's B and C were read: those waited for products and exchanges, some
//   150 cycles a token; now four tokens' sums are stored together;
// - twelve loads a group were waited for at once;
// - the wave of 116 left most of the GPU idle.
// Predicted by the same replay, not measured: 2.7 ms for the wave of 396, 0.9 for the rest and 0.2 for its adjoints, in
// all some 4.3 with the reductions and a tenth for what the replay does not know.
//
// Tried before, in ms at the shape above: the general kernel 15.6; decays kept in registers beside the states, states
// saved every four tokens, products chained 6.87; decays computed twice, products independent, four blocks an SM (the
// whole shape in one wave, but 820 bytes spilled) 7.24, three blocks 6.63. Four blocks of this form spill 620 bytes.
#pragma once
#include "common/cuda_pipeline.cuh"
#include "selective_scan/cuda_scan_bwd_lanes.cuh"
#include "selective_scan/cuda_scan_bwd_sums.cuh"

namespace scalekern::scan {

template <class T, bool kReverse>
struct ScanBwdRows : BwdLanes {
  using Tile = BwdTile<kReverse>;
  static constexpr int kWidth = 2 * kRowStates;  // dB and dC of a token
  static constexpr int kSteps = 4;  // tokens whose states stay in registers
  // Of a warp: the states of 32 lanes on entering each of 8 groups, and one piece more: the sums of a group's 8 tokens
  // take the place of the states of the group after it, which are used up.
  static constexpr int kPiece = kStates * 32, kPieces = kRowTokens / kGroup + 1;
  static_assert(kPiece == kGroup * kWidth);
  // 8 tokens of 16 channels, raw (two groups in turn) and prepared, four tokens of all channels beside each other.
  static constexpr int kRows = 16 * kGroup;
  enum Raws { kU, kDelta, kDout, kZ, kRaws };
  enum Prepared { kStep, kDu, kDy, kGate, kPrepared };
  static constexpr int kFloats = 2 * kMatrix + kWarps * (kPieces * kPiece + kPrepared * kRows);
  static constexpr int kSharedBytes = int(sizeof(F)) * kFloats + int(sizeof(T)) * kWarps * 2 * kRaws * kRows;

  struct Walk {
    F A[kStates], g[kStates], dA[kStates];
    F D, bias, dD, dbias;
    ChannelSums channels;
    const T *both, *down;  // what this lane copies, of both sweeps (u or delta) and of the one down (dout or z)
    T *du, *ddelta, *dz;
    int half, turn;
    bool active;
  };

  static SK_DEVICE F* tile_B() { return reinterpret_cast<F*>(shared_memory()); }
  static SK_DEVICE F* tile_C() { return tile_B() + kMatrix; }
  static SK_DEVICE F* piece(int i, int warp = thread_index() / 32) {
    return tile_C() + kMatrix + (warp * kPieces + i) * kPiece;
  }
  // Four tokens of this lane's channel: the first four in scan order, or the last four.
  static SK_DEVICE F* prepared(Prepared kind, int last) {
    F* of_warp = tile_C() + kMatrix + kWarps * kPieces * kPiece + thread_index() / 32 * kPrepared * kRows;
    return of_warp + kind * kRows + (last * 16 + lane() % 16) * 4;
  }
  static SK_DEVICE T* raw(int kind, int turn) {
    T* of_warp = reinterpret_cast<T*>(tile_B() + kFloats) + thread_index() / 32 * 2 * kRaws * kRows;
    return of_warp + (turn * kRaws + kind) * kRows + lane() % 16 * kGroup;
  }

  static SK_DEVICE Walk begin_walk(const Args& a, const Place& place) {
    Walk w{};
    load_A(a, place, w.A);
    const F* entry = static_cast<const F*>(a.entry) + place.row(a, place.chunk) * a.p.states;
    if (place.split) load_states(a, place, entry, 1, w.g);
    else load_states(a, place, row_of(a.dlast, place), a.dlast.n, w.g);
    w.D = vector_at(a.p.D, place), w.bias = vector_at(a.p.bias, place);
    w.channels = ChannelSums::of_lane();
    const bool upper = place.half != 0;
    w.both = upper ? row_of<T>(a.p.delta, place) : row_of<T>(a.p.u, place);
    w.down = upper ? row_of<T>(a.p.z, place) : row_of<T>(a.dout, place);
    w.du = row_of<T>(a.du, place), w.ddelta = row_of<T>(a.ddelta, place), w.dz = row_of<T>(a.dz, place);
    w.half = place.half, w.active = place.active;
    return w;
  }

  // copy_in_group that also brings the line around into L2: all of a tile's tokens of 2 bytes, or half of them.
  static SK_DEVICE void copy_row(T* to, const T* from) {
#if defined(__CUDA_ARCH__)
    const unsigned address = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
    copy_in_group(to, from);
#endif
  }

  // Begins to copy the rows of the group at token t.
  static SK_DEVICE void fetch(const Walk& w, int64_t t, int turn, bool down) {
    constexpr int kPack = Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < kGroup; k += kPack) {
      copy_row(raw(kU, turn) + w.half * kRows + k, w.both + t + k);
      if (down && w.down) copy_row(raw(kDout, turn) + w.half * kRows + k, w.down + t + k);
    }
  }

  // Four tokens of a row, in scan order.
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  static SK_DEVICE void load_four(const T* from, F (&x)[4]) {
    const Four four = *reinterpret_cast<const Four*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widen(kReverse ? four.v[3 - i] : four.v[i]);
  }
  static SK_DEVICE void store_four(T* to, const F (&x)[4]) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t low = kReverse ? narrow_pair<T>(x[3], x[2]) : narrow_pair<T>(x[0], x[1]);
      const uint32_t high = kReverse ? narrow_pair<T>(x[1], x[0]) : narrow_pair<T>(x[2], x[3]);
      *reinterpret_cast<uint64_t*>(to) = uint64_t(high) << 32 | low;
    } else {
      *reinterpret_cast<Four*>(to) = kReverse ? Four{x[3], x[2], x[1], x[0]} : Four{x[0], x[1], x[2], x[3]};
    }
  }

  // Where the four tokens of a group that this lane prepares and finishes begin in memory.
  static SK_DEVICE int own(const Walk& w) { return (w.half != 0) != kReverse ? kSteps : 0; }

  // The group that was fetched last becomes the one to be swept, and the next one is fetched: the one at token `next`,
  // unless that is negative. Each of a channel's two lanes prepares four tokens; zeros where there is no channel, whose
  // sums must not count.
  template <bool kDown>
  static SK_DEVICE void turn_to_group(const Args& a, Walk& w, int64_t next, bool next_down) {
    copy_wait_but<0>();
    sync_warp();  // the other lanes have read what is overwritten from here on
    w.turn ^= 1;
    if (next >= 0) fetch(w, next, w.turn ^ 1, next_down);
    copy_group();
    F u[4], step[4];
    load_four(raw(kU, w.turn) + own(w), u);
    load_four(raw(kDelta, w.turn) + own(w), step);
#pragma unroll
    for (int j = 0; j < 4; ++j) step[j] += w.bias;
    if (a.p.softplus) {  // once for all four: their chains of dependent operations then overlap
#pragma unroll
      for (int j = 0; j < 4; ++j) step[j] = softplus(step[j]);
    }
    Quad<F> quad;
    const auto put = [&](Prepared kind, auto&& value) {
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.v[j] = value(j);
      *reinterpret_cast<Quad<F>*>(prepared(kind, w.half)) = quad;
    };
    put(kStep, [&](int j) { return step[j]; });
    put(kDu, [&](int j) { return w.active ? u[j] * step[j] : F(0); });
    if constexpr (kDown) {
      F dy[4];
      load_four(raw(kDout, w.turn) + own(w), dy);
      if (a.p.z.p) {
        F z[4], gate[4];
        load_four(raw(kZ, w.turn) + own(w), z);
#pragma unroll
        for (int j = 0; j < 4; ++j) gate[j] = sigmoid(z[j]), dy[j] *= z[j] * gate[j];
        put(kGate, [&](int j) { return gate[j]; });
      }
      put(kDy, [&](int j) { return w.active ? dy[j] : F(0); });
    }
    sync_warp();
  }

  // One token up.
  static SK_DEVICE void advance_states(const Walk& w, const F* Bs, int j, F step, F du, F (&h)[kStates]) {
    F B[kStates];
    load_matrix<kReverse>(Bs, j, B);
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = advance(exp2_unit(step * w.A[i]), h[i], du, B[i]);
  }

  // Four tokens up.
  static SK_DEVICE void advance_four(const Walk& w, const F* Bs, int last, F (&h)[kStates]) {
    const Quad<F> step = load_quad(prepared(kStep, last)), du = load_quad(prepared(kDu, last));
#pragma unroll
    for (int j = 0; j < kSteps; ++j) advance_states(w, Bs, last * kSteps + j, step.v[j], du.v[j], h);
  }

  // Up the tile, leaving the states on entering each group in shared memory.
  static SK_DEVICE void advance_tile(const Args& a, Walk& w, const Tile& tile, F (&h)[kStates]) {
#pragma unroll 1
    for (int g = 0;; ++g) {
      F* own_states = piece(g) + lane();
#pragma unroll
      for (int i = 0; i < kStates; ++i) own_states[i * 32] = h[i];
      if (g == tile.groups - 1) return;
      turn_to_group<false>(a, w, tile.token(g + 1), g + 1 == tile.groups - 1);
      const F* Bs = tile_B() + tile.place(g) * kGroupPitch + kStates * w.half;
      advance_four(w, Bs, 0, h), advance_four(w, Bs, 1, h);
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

  // Four tokens of group g, backward in time: their states first, then the adjoint g.
  template <int kLast>
  static SK_DEVICE void sweep_four(Walk& w, const Tile& tile, int g, Sums& s) {
    const F* Bs = tile_B() + tile.place(g) * kGroupPitch + kStates * w.half;
    const F* Cs = Bs + kMatrix;
    F states[kSteps + 1][kStates];  // on entering each token, and at the end
#pragma unroll
    for (int i = 0; i < kStates; ++i) states[0][i] = piece(g)[i * 32 + lane()];
    if constexpr (kLast != 0) advance_four(w, Bs, 0, states[0]);
    const Quad<F> step = load_quad(prepared(kStep, kLast)), du = load_quad(prepared(kDu, kLast));
    const Quad<F> dy = load_quad(prepared(kDy, kLast));
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) states[j + 1][i] = states[j][i];
      advance_states(w, Bs, kLast * kSteps + j, step.v[j], du.v[j], states[j + 1]);
    }
    F sums[kSteps];
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      F B[kStates], C[kStates], x[2 * kStates], y = 0, gB = 0, gA = 0;
      load_matrix<kReverse>(Bs, kLast * kSteps + j, B);
      load_matrix<kReverse>(Cs, kLast * kSteps + j, C);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const F h = states[j + 1][i];
        w.g[i] = fused(C[i], dy.v[j], w.g[i]);
        y = fused(C[i], h, y);
        x[i] = w.g[i] * du.v[j], x[kStates + i] = h * dy.v[j];
        gB = fused(w.g[i], B[i], gB);
        w.g[i] *= decay_again(step.v[j], w.A[i]);
        const F dE = w.g[i] * states[j][i];  // the gradient of step * A
        w.dA[i] = fused(dE, step.v[j], w.dA[i]);
        gA = fused(dE, w.A[i], gA);
      }
      sums[j] = w.channels.template of<sizeof(T) == 4>(x);
      if constexpr (kLast != 0) s.y[j] = y, s.gB[j] = gB, s.gA[j] = gA;
      else s.join(w.half != 0, j, y, gB, gA);
    }
    // Not before all four tokens are through: a store would keep the next token's loads of B and C behind it, and with
    // them all of its work.
    const int value = ChannelSums::term();  // of dB of 8 states, then dC of 8 states
    F* row = piece(g + 1) + value / kStates * kRowStates + kStates * w.half + value % kStates;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int at = kLast * kSteps + j;
      row[(kReverse ? kGroup - 1 - at : at) * kWidth] = sums[j];
    }
  }

  // Each of the two lanes of a channel finishes four tokens of the group at token t.
  static SK_DEVICE void finish_group(const Args& a, Walk& w, int64_t t, const Sums& s) {
    if (!w.active) return;
    F u[4], du[4], ddelta[4];
    load_four(raw(kU, w.turn) + own(w), u);
    const Quad<F> step = load_quad(prepared(kStep, w.half)), dy = load_quad(prepared(kDy, w.half));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ddelta[i] = fused(s.gB[i], u[i], s.gA[i] * F(0.69314718055994530942));  // A is scaled by log2 e
      w.dD = fused(dy.v[i], u[i], w.dD);
      du[i] = fused(s.gB[i], step.v[i], w.D * dy.v[i]);
    }
    if (a.p.softplus) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ddelta[i] *= softplus_slope(step.v[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) w.dbias += ddelta[i];
    store_four(w.du + t + own(w), du);
    store_four(w.ddelta + t + own(w), ddelta);
    if (a.p.z.p) {
      F z[4], dout[4], dz[4];
      load_four(raw(kZ, w.turn) + own(w), z);
      load_four(raw(kDout, w.turn) + own(w), dout);
      const Quad<F> gate = load_quad(prepared(kGate, w.half));
#pragma unroll
      for (int i = 0; i < 4; ++i) dz[i] = dout[i] * fused(w.D, u[i], s.y[i]) * silu_slope(z[i], gate.v[i]);
      store_four(w.dz + t + own(w), dz);
    }
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
    const auto save = [&](int64_t row, const F(&dA)[kStates], F dD, F dbias) {
      save_states(a, place, static_cast<F*>(a.dA) + row * a.p.states, 1, dA);
      if (!w.active || w.half != 0) return;
      static_cast<F*>(a.dD)[row] = dD;
      static_cast<F*>(a.dbias)[row] = dbias;
    };
    w.dD += shuffle_xor(w.dD, 16), w.dbias += shuffle_xor(w.dbias, 16);
    save(place.row(a, place.chunk), w.dA, w.dD, w.dbias);
    const F none[kStates] = {};
    for (int64_t chunk = 1; !place.split && chunk < a.chunks; ++chunk) save(place.row(a, chunk), none, 0, 0);
  }

  static SK_DEVICE void run(const Args& a) {
    const int64_t rest = block_index() - a.whole;
    const Place place =
        rest < 0 ? place_of(a, block_index(), 0) : place_of(a, a.whole + rest / a.chunks, rest % a.chunks);
    Walk w = begin_walk(a, place);
    Tile tile = Tile::of(a.p, place.end - 1);
    fetch(w, tile.token(0), 1, tile.groups == 1);
    copy_group();
#pragma unroll 1
    for (int64_t i = place.end - 1; i >= place.begin; --i) {  // in scan order, from the last
      Raw<T, kGroup> B, C;
      F h[kStates];
      load_share(a, place, a.p.B, tile.t0, B);
      load_share(a, place, a.p.C, tile.t0, C);
      load_states(a, place, checkpoint<F>(a.p, place.batch, tile.t0 / kRowTokens, place.channel), 1, h);
      store_share(B, tile_B());
      store_share(C, tile_C());
      sync_threads();
      advance_tile(a, w, tile, h);
      const Tile next = i > place.begin ? Tile::of(a.p, i - 1) : Tile{-1, 1};
      const int64_t first_of_next = next.t0 < 0 ? -1 : next.token(0);
#pragma unroll 1
      for (int g = tile.groups - 1; g >= 0; --g) {
        turn_to_group<true>(a, w, g > 0 ? tile.token(g - 1) : first_of_next, g > 0 || next.groups == 1);
        Sums sums;
        sweep_four<1>(w, tile, g, sums);
        sweep_four<0>(w, tile, g, sums);
        finish_group(a, w, tile.token(g), sums);
      }
      sync_threads();
      store_sums(a, place, tile);
      sync_threads();
      tile = next;
    }
    save_parameter_gradients(a, place, w);
    if (a.dinitial.p && place.chunk == 0) save_states(a, place, row_of(a.dinitial, place), a.dinitial.n, w.g);
  }
};

}  // namespace scalekern::scan
