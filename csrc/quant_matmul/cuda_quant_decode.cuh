// Low-bit codes of the plain layout to operands of the tensor cores, by bit operations.
//
// A unit is 32 neighbouring codes of a row: kBits words. Its 16 pairs hold two codes each, one in either half of a
// register. Which two does not matter to a product, as long as x is put in the same order, which happens once for all
// rows: of 1, 2, 4 and 8 bits those that lie 16 bits apart in a word, else codes j and j + 16 (16 kBits bits apart,
// whole half words: kBits permutations put them 16 bits apart too). A pair then costs, bits in words or not,
//
//     (a shift, shared by some,) one LOP3 into the mantissa of 1024 (float16) or 128 (bfloat16), 2^p too high,
//     one FMA of pairs back to code - centre, exact: * 2^-p, - (1024 * 2^-p + centre)
//
// and two shifts and two LOP3 where a code of 3, 5, 6 or 7 bits lies across half words. 8 bits do not fit into
// bfloat16's mantissa: the highest one takes a LOP3 and an FMA of its own. A table of 16 numbers is looked up by
// permutations, four codes at a time, its low and high bytes apart.
#pragma once
#include <bit>

#include "common/cuda_pipeline.cuh"

namespace scalekern::gemv {

using namespace scalekern::device;

constexpr int kTable = -1;  // in the place of a centre

template <class T>
constexpr int kMantissa = 10;
template <>
constexpr int kMantissa<bf16> = 7;

// x, which both types hold exactly, in either half. Evaluated at compile time.
template <class T>
constexpr uint32_t twice(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const uint32_t half = kMantissa<T> == 7 ? bits >> 16 : x == 0 ? 0 : sign | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
  return half | half << 16;
}

constexpr float power_of_two(int n) { return std::bit_cast<float>(uint32_t(127 + n) << 23); }

// a * b + c of pairs, rounded once.
template <class T>
SK_FN uint32_t fused_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  if constexpr (std::is_same_v<T, bf16>) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  const auto half = [&](int shift) {
    const auto at = [&](uint32_t word) { return widen(T{uint16_t(word >> shift)}); };
    return fused(at(a), at(b), at(c));
  };
  return narrow_pair<T>(half(0), half(16));
#endif
}

// (a & mask) | bits, of constants: left to itself the compiler makes two instructions of it.
template <uint32_t kMask, uint32_t kBits>
SK_FN uint32_t masked_into(uint32_t a) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(kMask), "n"(kBits));
  return d;
#else
  return (a & kMask) | kBits;
#endif
}

// T: the operands' type. kCentre: the code of 0, or kTable.
template <class T, int kBits, int kCentre>
struct Codes {
  static constexpr bool kInWord = 16 % kBits == 0;
  static constexpr int kPerHalf = kInWord ? 16 / kBits : 16;

  // The codes of pair i of a unit.
  static constexpr int first(int i) { return kCentre == kTable ? 2 * i : i / kPerHalf * 2 * kPerHalf + i % kPerHalf; }
  static constexpr int second(int i) { return first(i) + (kCentre == kTable ? 1 : kPerHalf); }

  uint32_t u[kBits];

  SK_FN explicit Codes(const uint32_t* w) {
#pragma unroll
    for (int q = 0; q < kBits; ++q) {
      if constexpr (kInWord) u[q] = w[q];
      else u[q] = permute(w[q / 2], w[(q + kBits) / 2], (q % 2 ? 0x32 : 0x10) | ((q + kBits) % 2 ? 0x7600 : 0x5400));
    }
  }

  // Pair i as code - centre (of one bit: -1 and 1).
  template <int i>
  SK_FN uint32_t pair() const {
    constexpr int kLow = kBits == 1;  // one bit needs a place more, for its - 1
    constexpr int kBit = kInWord ? i % kPerHalf * kBits : i * kBits;
    constexpr int q = kInWord ? i / kPerHalf : kBit / 16, p = kBit % 16;
    constexpr int kPlaces = kMantissa<T> - kBits - kLow + 1;  // of a code in the mantissa
    constexpr float kMagic = power_of_two(kMantissa<T>);
    if constexpr (p + kBits > 16) {
      constexpr uint32_t kHere = (1u << (16 - p)) - 1;
      const uint32_t here = u[q] >> p, there = u[q + 1] << (16 - p);
      const uint32_t code = (here & kHere * 0x10001) | (there & ~(kHere * 0x10001));
      return centred<0>(code);
    } else if constexpr (kPlaces <= 0) {  // 8 bits and bfloat16: the lower seven, and 128 or 256 of the highest
      const uint32_t code = u[q] >> p;
      const uint32_t low = masked_into<0x7f * 0x10001, twice<T>(kMagic)>(code);
      const uint32_t high = masked_into<0x80 * 0x10001, twice<T>(kMagic)>(code);
      return fused_pair<T>(low, twice<T>(1), fused_pair<T>(high, twice<T>(1), twice<T>(-2 * kMagic - kCentre)));
    } else {
      constexpr int kShift = p < kLow ? -kLow : (p - kLow) / kPlaces * kPlaces;
      return centred<p - kShift>(kShift < 0 ? u[q] << 1 : u[q] >> (kShift < 0 ? 0 : kShift));
    }
  }

  // Codes at bit kAt of either half.
  template <int kAt>
  static SK_FN uint32_t centred(uint32_t code) {
    constexpr int kDown = kAt - (kBits == 1), kCentreHere = kBits == 1 ? 1 : kCentre;
    constexpr uint32_t kMask = (((1u << kBits) - 1) << kAt) * 0x10001;
    constexpr uint32_t kBack = twice<T>(-power_of_two(kMantissa<T> - kDown) - kCentreHere);
    static_assert(kAt + kBits <= kMantissa<T>);
    const uint32_t large = masked_into<kMask, twice<T>(power_of_two(kMantissa<T>))>(code);
    return fused_pair<T>(large, twice<T>(power_of_two(-kDown)), kBack);
  }
};

// 16 numbers of 16 bits: their low and their high bytes.
struct Planes {
  uint32_t low[4], high[4];

  template <class T>
  static SK_DEVICE Planes of(const float* table) {
    Planes planes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = narrow_pair<T>(table[4 * i], table[4 * i + 1]);
      const uint32_t b = narrow_pair<T>(table[4 * i + 2], table[4 * i + 3]);
      planes.low[i] = permute(a, b, 0x6420), planes.high[i] = permute(a, b, 0x7531);
    }
    return planes;
  }

  // The numbers of the four codes in the lower half of `codes`, as two pairs.
  SK_FN void look_up(uint32_t codes, uint32_t (&pairs)[2]) const {
    const uint32_t which = codes & 0x7777;
    const uint32_t upper = permute(0x0000ff00u, 0, (codes >> 3) & 0x1111);  // 0xff in the bytes whose code is 8 or more
    const uint32_t a = pick(permute(low[0], low[1], which), permute(low[2], low[3], which), upper);
    const uint32_t b = pick(permute(high[0], high[1], which), permute(high[2], high[3], which), upper);
    pairs[0] = permute(a, b, 0x5140), pairs[1] = permute(a, b, 0x7362);
  }
  static SK_FN uint32_t pick(uint32_t a, uint32_t b, uint32_t second) { return (a & ~second) | (b & second); }
};

}  // namespace scalekern::gemv
