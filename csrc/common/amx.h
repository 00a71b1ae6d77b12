// Instructions beyond AVX-512 that a kernel of that level asks for at run time, and writes as assembly: nothing is
// compiled anew for them. SCALEKERN_CPU_ISA=avx512 hides them all, vnni all but the first, bf16 the last.
//
//   vnni  sums of products of bytes (Ice Lake)
//   bf16  sums of products of bfloat16, and permutations of bytes (Zen 4)
//   amx   tile registers (Sapphire Rapids): eight of 16 rows of 64 bytes, a product of two in 16 cycles
//     add_products<C, A, B>     c[i][j] += sum over k < 64 of a[i][k] b[k / 4][4 j + k % 4]   int8, int32: exact
//     add_bf16_products<...>    c[i][j] += sum over k < 32 of a[i][k] b[k / 2][2 j + k % 2]   bfloat16, float
//   So a is read as it lies, rows along K, and b in fours (pairs) of numbers of a column. bfloat16 products round to
//   nearest, take subnormals as 0 and add pairs of products before the sum: a loop rounds otherwise.
#pragma once
#include <cstdint>

namespace scalekern {

bool has_vnni();
bool has_bf16();  // and vnni
bool has_amx();   // and bf16

}  // namespace scalekern

#if defined(__AVX512F__)
#include "common/vec.h"

namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64, kTileLanes = 16;

// The tile registers of this thread, where there are some, all of them 16 x 64 bytes unless shaped: made by each thread
// for itself, around all that uses them, and given back at the end, so that the core can sleep.
class Tiles {
 public:
  Tiles() {
    if (in_use_) shape(0, 8, kTileRows, kTileBytes);
  }
  // Registers from `first` on; all become 0.
  void shape(int first, int count, int64_t rows, int64_t bytes) {
    for (int i = first; i < first + count; ++i) config_.bytes[i] = uint16_t(bytes), config_.rows[i] = uint8_t(rows);
    asm volatile("ldtilecfg %0" : : "m"(config_));
  }
  ~Tiles() {
    if (in_use_) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
  const bool in_use_ = scalekern::has_amx();
};

template <int T>
static inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows `pitch` bytes apart.
template <int T>
static inline void load_tile(const void* from, int64_t pitch) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(pitch) : "memory");
}
template <int T>
static inline void store_tile(void* to, int64_t pitch) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(pitch) : "memory");
}
template <int C, int A, int B>
static inline void add_products() {  // both signed
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
static inline void add_bf16_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// 32 floats to bfloat16, to nearest; subnormals become 0.
static inline __m512i to_bf16(__m512 low, __m512 high) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return both;
}

// Bytes of v, or of 128 in a and b, at the places in `order`.
static inline __m512i permute_bytes(__m512i order, __m512i v) {
  __m512i bytes;
  asm("vpermb %1, %2, %0" : "=v"(bytes) : "vm"(v), "v"(order));
  return bytes;
}
static inline __m512i from_bytes(__m512i order, __m512i a, __m512i b) {
  asm("vpermi2b %2, %1, %0" : "+v"(order) : "v"(a), "v"(b));
  return order;
}

// sums[i] += sum over 4 bytes of unsigned a times signed b.
static inline __m512i add_byte_products(__m512i sums, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

// sums[i] += sum over 2 numbers of bfloat16 a times b, rounded as add_bf16_products does.
static inline __m512 add_bf16_pairs(__m512 sums, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

}  // namespace

#endif
