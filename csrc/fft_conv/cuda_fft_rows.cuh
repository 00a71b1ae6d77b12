// Rows of the fused transform (cuda_fft_conv.cuh) between global and shared memory, and where things lie in the latter.
#pragma once
#include <cmath>

#include "fft_conv/cuda_fft_numbers.cuh"

namespace scalekern::fft {

constexpr int kWarps = 8;
constexpr uint32_t kInfinity = 0x7f800000;  // bits of float32

struct Args {
  const void *x, *gate, *post;  // (B, D, L); gates may be absent
  const unsigned char* mask;    // (B, L), zero where a sample of x is none, whatever lies there; may be absent
  void* out;
  int64_t mask_b, x_b, x_d, gate_b, gate_d, post_b, post_d, out_b, out_d;
  const float *bias, *scale;  // (D,): what is added (may be absent), what a result of the transform is multiplied by
  const uint16_t *spectrum, *tables;  // (D, parts, N, 2) in the order of side II; see Tables
  int length_in, length_out, batch, channels, parts, turns;
  bool aligned;  // rows begin at multiples of 16 bytes
};

// Bytes of what Python lays out; all of it but the fragments is copied to shared memory.
template <int kN1>
struct Tables {
  static constexpr int kFactor = kN1 * kN1 * 4, kTwiddle1 = kN1 * 16 * 4, kTwiddle2 = kN1 * 256 * 4;
  static constexpr int kFirst = 0, kLast = kFirst + kFactor, kInner = kLast + kFactor;
  static constexpr int kInnerBack = kInner + kTwiddle1, kOuter = kInnerBack + kTwiddle1;
  static constexpr int kFragments = kOuter + kTwiddle2;  // 12 x 32 lanes x 16 bytes
};

// kTogether rows of N1 256 / kTogether points, or one row in kParts parts of N1 256 (`a.parts` of them at most).
template <class T, int kN1, int kTogether, int kParts>
struct Rows {
  using Args = fft::Args;
  using Layout = Tables<kN1>;
  static constexpr int kThreads = 32 * kWarps, kN = kN1 * 256, kPacks = kN / 8 / kThreads;
  static constexpr int kOfARow = kN / 8 / kTogether;           // pieces of 8 samples
  static constexpr int kScales = kTogether > 1 ? kPacks : 1;  // of a thread's pieces
  // Words of 4 bytes between rows of the row as it comes (n1; n2), and of the result.
  static constexpr int kIn1 = 168, kIn2 = 9, kOut1 = 292, kOut2 = 18;
  static constexpr int kWork = Layout::kFragments, kMaxima = kWork + kN1 * kOut1 * 4;
  static constexpr int kSizes = kMaxima + kScales * kWarps * 4;  // of the parts
  static constexpr int kStore = kSizes + kParts * 4 + (-kParts * 4 & 15);  // the spectrum, or transforms of parts
  static_assert(kN1 * kIn1 <= kN1 * kOut1 && kN * 4 <= kN1 * kOut1 * 4 && (kTogether == 1 || kParts == 1));
  static constexpr int kMostShared = kParts > 2 ? 227 : 163;  // KB; 227: not on sm_80
  static int shared_bytes(int parts) { return kStore + (kParts == 1 ? 1 : parts - 1) * kN * 4; }

  const Args& a;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  unsigned char* const shared = shared_memory();

  SK_DEVICE uint32_t* work() const { return reinterpret_cast<uint32_t*>(shared + kWork); }
  SK_DEVICE float& size(int part) const { return reinterpret_cast<float*>(shared + kSizes)[part]; }

  // A thread's i-th piece of 8 samples: its row and its place there.
  struct Piece {
    int64_t b;
    int t;
  };
  SK_DEVICE Piece piece(int i, int first_row, int part) const {
    const int number = thread_index() + i * kThreads;
    if constexpr (kTogether > 1) return {first_row + number / kOfARow, number % kOfARow * 8};
    return {first_row, number * 8 + part * kN};
  }

  SK_DEVICE void read(float (&v)[8], const T* row, int t, int length) const {
    if (a.aligned && t + 8 <= length) {
      const auto eight = *reinterpret_cast<const Pack<T>*>(row + t);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = widen(eight.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = t + i < length ? widen(row[t + i]) : 0.f;
    }
  }

  static SK_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

  // Writes x gate / scale as float16 to `work`; gives each piece's scale, the largest magnitude of its row (of its
  // part). Where that is not finite, zeros, of which such a scale makes NaN: rows that are transformed together meet in
  // products. Magnitudes are compared as bits, in whose order infinity is above all numbers and NaN above infinity. Two
  // barriers.
  SK_DEVICE void bring(int64_t first_row, int64_t d, int part, float (&scale)[kScales]) const {
    float v[kPacks][8];
    uint32_t largest[kScales] = {};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const auto [b, t] = piece(i, first_row, part);
      const int length = kTogether == 1 || b < a.batch ? a.length_in : 0;
      read(v[i], static_cast<const T*>(a.x) + b * a.x_b + d * a.x_d, t, length);
      if (a.mask) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (t + j < length && !a.mask[b * a.mask_b + t + j]) v[i][j] = 0;
      }
      if (a.gate) {
        float by[8];
        read(by, static_cast<const T*>(a.gate) + b * a.gate_b + d * a.gate_d, t, length);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] *= by[j];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) largest[i % kScales] = larger(largest[i % kScales], as_bits(fabsf(v[i][j])));
    }
    uint32_t* maxima = reinterpret_cast<uint32_t*>(shared + kMaxima);
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
#pragma unroll
      for (int mask = 16; mask; mask /= 2) largest[s] = larger(largest[s], shuffle_xor(largest[s], mask));
      if (lane == 0) maxima[s * kWarps + warp] = largest[s];
    }
    sync_threads();
    constexpr int kSharing = kOfARow < kThreads ? kOfARow / 32 : kWarps;  // warps that have a row's pieces
#pragma unroll
    for (int s = 0; s < kScales; ++s) {
#pragma unroll
      for (int i = 0; i < kSharing; ++i)
        largest[s] = larger(largest[s], maxima[s * kWarps + warp / kSharing * kSharing + i]);
      const float found = as_float(largest[s]);
      if (kParts > 1 && thread_index() == 0) size(part) = found < 1e-30f ? 0.f : found;
      scale[s] = found < 1e-30f ? 1.f : found;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int number = thread_index() + i * kThreads;
      const bool finite = largest[i % kScales] < kInfinity;
      const float inverse = 1 / scale[i % kScales];
      uint32_t* to = work() + number / 32 * kIn1 + number / 2 % 16 * kIn2 + number % 2 * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        to[j] = finite ? narrow_pair<f16>(v[i][2 * j] * inverse, v[i][2 * j + 1] * inverse) : 0;
    }
    sync_threads();
  }

  SK_DEVICE void take_away(int64_t first_row, int64_t d, int part, const float (&scale)[kScales]) const {
    const float bias = a.bias ? a.bias[d] : 0.f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const auto [b, t] = piece(i, first_row, part);
      if (t >= a.length_out || (kTogether > 1 && b >= a.batch)) continue;
      T* out = static_cast<T*>(a.out) + b * a.out_b + d * a.out_d;
      const int number = thread_index() + i * kThreads;
      const float* from =
          reinterpret_cast<const float*>(work()) + number / 32 * kOut1 + number / 2 % 16 * kOut2 + number % 2 * 8;
      float y[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = fused(from[j], scale[i % kScales], bias);
      if (a.post) {
        float by[8];
        read(by, static_cast<const T*>(a.post) + b * a.post_b + d * a.post_d, t, a.length_out);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] *= by[j];
      }
      if (a.aligned && t + 8 <= a.length_out) {
        Group<T, 8>::of(y).store(out + t);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (t + j < a.length_out) out[t + j] = narrow<T>(y[j]);
      }
    }
  }
};

}  // namespace scalekern::fft
