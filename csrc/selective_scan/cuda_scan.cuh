// What the forward and the backward scan share: the problem, the split of channels into blocks, packed bounds,
// tiles in shared memory, and one step of the recurrence.
//
// Shape letters: B batch, D channels, L length, N states, G groups of B and C, S packed sequences.
//
// A thread owns one channel and kStates of its states; `lanes` neighbouring threads (a power of two up to 32) own one
// channel together. Their states are interleaved in quads: lane r owns states 4 (lanes q + r) .. + 3 for q = 0, 1, ...,
// so that the lanes of a channel read consecutive quads of B and C from shared memory, without bank conflicts.
#pragma once
#include "common/cuda_block.cuh"
#include "common/view.h"

namespace scalekern::scan {

using namespace scalekern::device;

constexpr int kGroup = 8;  // tokens that a thread takes at once

struct Sequences {  // (B, D, L)
  void* p;
  int64_t b, d, l;
};

struct Matrix {  // B or C: (B, G, N, L), or constant (D, N) with g the stride of a channel
  void* p;
  int64_t b, g, n, l;
  int64_t group;  // channels that share a row
  bool constant;
  SK_FN int64_t offset(int64_t batch, int64_t channel) const {
    return constant ? channel * g : batch * b + channel / group * g;
  }
};

struct States {  // (B, D, N) or (S, D, N)
  void* p;
  int64_t s, d, n;
};

struct Vector {  // (D,)
  void* p;
  int64_t d;
};

struct Problem {
  int64_t batch, channels, length, sequences;
  int states, lanes, channels_per_block;
  bool softplus, reverse;
  Sequences u, delta, z;
  Matrix B, C;
  States A, initial;  // A.s is unused
  Vector D, bias;
  Indices cu;         // data is null when not packed
  int64_t segment;    // channels that share their groups of B and of C: a block never leaves one
  int64_t blocks_per_segment;
  void* checkpoints;  // (B, slots, D, N), null when not saved
  int64_t slots, checkpoint_stride;

  SK_FN int64_t channel_blocks() const { return channels / segment * blocks_per_segment; }
};

// The channels of a block: [first, first + count).
struct Channels {
  int64_t first;
  int count;
};

SK_FN Channels channels_of(const Problem& p, int64_t channel_block) {
  const int64_t begin = channel_block / p.blocks_per_segment * p.segment;
  const int64_t within = channel_block % p.blocks_per_segment * p.channels_per_block;
  const int64_t left = p.segment - within;
  return {begin + within, int(left < p.channels_per_block ? left : p.channels_per_block)};
}

// The sequence that holds token t; its row in initial_state and last_state.
struct Sequence {
  int64_t row, begin, end;
  SK_FN bool holds(int64_t t) const { return begin <= t && t < end; }
  SK_FN int64_t first(bool reverse) const { return reverse ? end - 1 : begin; }
  SK_FN int64_t last(bool reverse) const { return reverse ? begin : end - 1; }
};

SK_FN Sequence sequence_at(const Problem& p, int64_t batch, int64_t t) {
  if (p.cu.data == nullptr) return {batch, 0, p.length};
  int64_t s = first_above(p.cu, p.sequences + 1, t) - 1;
  s = s < 0 ? 0 : s >= p.sequences ? p.sequences - 1 : s;  // bounds that do not cover t: wrong, but in memory
  return {s, p.cu[s], p.cu[s + 1]};
}

// Whether some sequence begins (in scan order) at a token of [begin, end).
SK_FN bool begins_within(const Problem& p, int64_t begin, int64_t end) {
  if (p.cu.data == nullptr) return p.reverse ? end == p.length : begin == 0;
  const int64_t shift = p.reverse ? 1 : 0;  // in reverse a sequence begins at its end - 1
  const int64_t i = first_above(p.cu, p.sequences + 1, begin + shift - 1);
  return i <= p.sequences && p.cu[i] < end + shift;
}

// The checkpoint slot to be written on entering token t, or -1.
SK_FN int64_t slot_at(const Problem& p, int64_t t) {
  const int64_t edge = p.reverse ? t + 1 : t;
  const bool enters = edge % p.checkpoint_stride == 0 || (p.reverse && edge == p.length);
  return enters && p.checkpoints != nullptr ? t / p.checkpoint_stride : -1;
}

template <class F>
SK_FN F* checkpoint(const Problem& p, int64_t batch, int64_t slot, int64_t channel) {
  return static_cast<F*>(p.checkpoints) + ((batch * p.slots + slot) * p.channels + channel) * p.states;
}

// State number of a thread's i-th state.
SK_FN int state_of(int lanes, int lane, int i) { return 4 * (lanes * (i / 4) + lane) + i % 4; }

// --- tiles: rows (channels or states) x tokens of one tensor, laid out in shared memory as they lie in memory ---

struct Tile {
  int row, time;  // pitches in elements; one of them is 1
  int bytes;
};

// Rows are padded by 16 bytes: 16-byte accesses of neighbouring rows then fall into different banks.
template <class T>
inline Tile tile_of(int64_t time_stride, int rows, int tokens) {
  constexpr int pad = 16 / int(sizeof(T));
  if (time_stride == 1) {
    const int pitch = int(round_up(tokens, pad)) + pad;
    return {pitch, 1, int(sizeof(T)) * pitch * rows};
  }
  const int pitch = int(round_up(rows, pad)) + pad;
  return {1, pitch, int(sizeof(T)) * pitch * tokens};
}

// Global to shared memory, 16 bytes at a time and asynchronously where alignment allows. src is (row 0, first token).
template <class T>
SK_DEVICE void stage(
    T* tile, const Tile& shape, const T* src, int64_t row, int64_t time, int rows, int tokens, int threads) {
  constexpr int kPack = Pack<T>::kSize;
  const bool by_time = shape.time == 1;
  const int outer = by_time ? rows : tokens, inner = by_time ? tokens : rows;
  const int64_t outer_stride = by_time ? row : time, inner_stride = by_time ? time : row;
  const int pitch = by_time ? shape.row : shape.time;
  const int packs = (inner + kPack - 1) / kPack;
  const bool fast = inner_stride == 1 && aligned16(src) && outer_stride % kPack == 0;
  for (int i = thread_index(); i < outer * packs; i += threads) {
    const int o = i / packs, k = (i - o * packs) * kPack;
    const T* from = src + o * outer_stride + k * inner_stride;
    T* to = tile + o * pitch + k;
    if (fast && k + kPack <= inner) {
      copy_async(to, from);
    } else {
      for (int e = 0; e < kPack && k + e < inner; ++e) to[e] = from[e * inner_stride];
    }
  }
}

// Shared to global memory.
template <class T>
SK_DEVICE void unstage(
    const T* tile, const Tile& shape, T* dst, int64_t row, int64_t time, int rows, int tokens, int threads) {
  constexpr int kPack = Pack<T>::kSize;
  const bool by_time = shape.time == 1;
  const int outer = by_time ? rows : tokens, inner = by_time ? tokens : rows;
  const int64_t outer_stride = by_time ? row : time, inner_stride = by_time ? time : row;
  const int pitch = by_time ? shape.row : shape.time;
  const int packs = (inner + kPack - 1) / kPack;
  const bool fast = inner_stride == 1 && aligned16(dst) && outer_stride % kPack == 0;
  for (int i = thread_index(); i < outer * packs; i += threads) {
    const int o = i / packs, k = (i - o * packs) * kPack;
    T* to = dst + o * outer_stride + k * inner_stride;
    const T* from = tile + o * pitch + k;
    if (fast && k + kPack <= inner) {
      *reinterpret_cast<Pack<T>*>(to) = *reinterpret_cast<const Pack<T>*>(from);
    } else {
      for (int e = 0; e < kPack && k + e < inner; ++e) to[e * inner_stride] = from[e];
    }
  }
}

template <class F>
SK_DEVICE void swap_ends(F (&x)[kGroup]) {
  for (int j = 0; j < kGroup / 2; ++j) {
    const F low = x[j];
    x[j] = x[kGroup - 1 - j], x[kGroup - 1 - j] = low;
  }
}

// Tokens first .. first + 7 of a row, widened, in scan order.
template <class T, class F>
SK_DEVICE void load_group(const T* tile, const Tile& shape, int row, int first, bool reverse, F (&x)[kGroup]) {
  if (shape.time == 1) {
    constexpr int kPack = Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < kGroup; k += kPack) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(tile + row * shape.row + first + k);
#pragma unroll
      for (int e = 0; e < kPack; ++e) x[k + e] = widen(pack.v[e]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) x[j] = widen(tile[(first + j) * shape.time + row]);
  }
  if (reverse) swap_ends(x);
}

template <class T, class F>
SK_DEVICE void store_group(T* tile, const Tile& shape, int row, int first, bool reverse, F (&x)[kGroup]) {
  if (reverse) swap_ends(x);
  if (shape.time == 1) {
    constexpr int kPack = Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < kGroup; k += kPack) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.v[e] = narrow<T>(x[k + e]);
      *reinterpret_cast<Pack<T>*>(tile + row * shape.row + first + k) = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) tile[(first + j) * shape.time + row] = narrow<T>(x[j]);
  }
}

// B or C of a block as F: (tokens, padded) from a raw tile, or (channels, padded + 4) when constant.
template <class T, class F>
SK_DEVICE void widen_matrix(F* out, int padded, const T* raw, const Tile& shape, int states, int tokens, int threads) {
  for (int i = thread_index(); i < tokens * padded; i += threads) {
    const int t = i / padded, n = i - t * padded;
    out[i] = n < states ? F(widen(raw[n * shape.row + t * shape.time])) : F(0);
  }
}

template <class T, class F>
SK_DEVICE void load_constant(F* out, int padded, const Matrix& m, const Channels& block, int states, int threads) {
  const int pitch = padded + 4;
  for (int i = thread_index(); i < block.count * padded; i += threads) {
    const int c = i / padded, n = i - c * padded;
    const T* row = static_cast<const T*>(m.p) + m.offset(0, block.first + c);
    out[c * pitch + n] = n < states ? F(widen(row[n * m.n])) : F(0);
  }
}

// Shared bytes of widen_matrix's or load_constant's result.
template <class F>
inline int matrix_bytes(const Matrix& m, int padded, int tokens, int channels) {
  return int(sizeof(F)) * (m.constant ? channels * (padded + 4) : tokens * padded);
}

// --- one step ---

// A quad of B or C.
template <class F>
struct alignas(16) Quad {
  F v[4];
};

template <class F>
SK_DEVICE Quad<F> load_quad(const F* p) {
  return *reinterpret_cast<const Quad<F>*>(p);
}

template <class F>
SK_DEVICE void store_quad(F* p, const Quad<F>& quad) {
#if defined(__CUDACC__)
  if constexpr (sizeof(F) == 4) {  // the compiler would store each of the four by itself
    asm volatile("st.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(quad.v[0]), "f"(quad.v[1]), "f"(quad.v[2]),
                 "f"(quad.v[3]) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Quad<F>*>(p) = quad;
}

// A in the base of the exponential that the steps use: 2 for float, e for double's exp2 alike.
template <class F>
SK_FN F scaled_A(F a) {
  return a * F(1.4426950408889634074);
}

// exp(d a), a scaled. One in kPolyEvery exponentials leaves the special-function unit alone. With 16 a thread that is 2
// of 16: the unit then needs 28 cycles a token and warp and the issue slots 29, by count (see cuda_scan_fwd.cuh).
constexpr int kPolyEvery = 8;

template <class F>
SK_FN F decay_of(F d, F a, int i) {
  return i % kPolyEvery == kPolyEvery - 1 ? exp2_poly(d * a) : exp2_unit(d * a);
}

// h_t = decay h_{t-1} + (d u) B
template <class F>
SK_FN F advance(F decay, F h, F du, F b) {
  return fused(decay, h, du * b);
}

template <class F>
SK_FN F step_size(F delta, F bias, bool apply_softplus) {
  const F x = delta + bias;
  return apply_softplus ? softplus(x) : x;
}

}  // namespace scalekern::scan
