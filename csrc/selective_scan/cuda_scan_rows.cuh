// What the fast forward and backward scans share: rows of tokens that lie along time on 16-byte bounds, at most 16
// states, nothing packed. Everything else takes the general kernels (cuda_scan_fwd.cuh, cuda_scan_bwd.cuh).
//
// u, delta, z, dout and the results go straight between global memory and registers, 8 tokens of a channel at a time: a
// warp's load touches a sector a channel, whose other half the next group finds in L1. What the general kernels spend
// on staging these rows in shared memory (a third of their instructions, measured) is gone. B and C, which all channels
// of a block share, are widened into shared memory, 64 tokens at a time, and read from there as broadcasts.
#pragma once
#include "selective_scan/cuda_scan.cuh"

namespace scalekern::scan {

constexpr int kRowStates = 16;  // of a channel, padded
constexpr int kRowTokens = 64;  // of a tile of B and C; the least checkpoint stride

// Tokens of a row as they lie in memory: in words, because the compiler keeps elements of 16 bits apart.
template <class T, int kCount>
struct Raw {
  static constexpr int kPer = 4 / int(sizeof(T)), kWords = kCount / kPer, kBytes = 4 * kWords < 16 ? 4 * kWords : 16;
  struct alignas(kBytes) Part {
    uint32_t w[kBytes / 4];
  };
  Part parts[4 * kWords / kBytes];

  SK_DEVICE uint32_t& word(int i) { return parts[4 * i / kBytes].w[i % (kBytes / 4)]; }
  SK_DEVICE uint32_t word(int i) const { return parts[4 * i / kBytes].w[i % (kBytes / 4)]; }

  SK_DEVICE void load(const T* p) { *this = *reinterpret_cast<const Raw*>(p); }
  SK_DEVICE void load(const T* p, bool inside) { *this = inside ? *reinterpret_cast<const Raw*>(p) : Raw{}; }
  SK_DEVICE void store(T* p) const { *reinterpret_cast<Raw*>(p) = *this; }

  SK_DEVICE Compute<T> at(int j) const {
    if constexpr (kPer == 1) return as_float(word(j));
    else return widen(T{uint16_t(word(j / 2) >> (j % 2 * 16))});
  }

  SK_DEVICE void set(const Compute<T> (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kPer == 1) word(i) = as_bits(x[i]);
      else word(i) = narrow_pair<T>(x[2 * i], x[2 * i + 1]);
    }
  }

  SK_DEVICE void turn() {
#pragma unroll
    for (int i = 0; i < (kWords + 1) / 2; ++i) {
      const uint32_t low = word(i), high = word(kWords - 1 - i);
      word(i) = kPer == 1 ? high : high >> 16 | high << 16;
      word(kWords - 1 - i) = kPer == 1 ? low : low >> 16 | low << 16;
    }
  }
};

// Whether a tensor's rows can be read in packs of 16 bytes.
template <class T>
bool packable(const Sequences& s) {
  return s.p == nullptr || (s.l == 1 && aligned16(s.p) && s.b % Pack<T>::kSize == 0 && s.d % Pack<T>::kSize == 0);
}

template <class T>
bool packable(const Matrix& m) {
  const int64_t size = Pack<T>::kSize;
  return !m.constant && m.l == 1 && aligned16(m.p) && m.b % size == 0 && m.g % size == 0 && m.n % size == 0;
}

template <class T>
bool takes_rows(const Problem& p) {
  return sizeof(Compute<T>) == 4 && p.cu.data == nullptr && p.states <= kRowStates && p.length % kGroup == 0 &&
         packable<T>(p.u) && packable<T>(p.delta) && packable<T>(p.z) && packable<T>(p.B) && packable<T>(p.C);
}

}  // namespace scalekern::scan
