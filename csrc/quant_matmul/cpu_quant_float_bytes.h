// Small floats of 8 bits, or 6 in the top bits of a byte, as bfloat16, which holds them: a table of 128 for each of its
// bytes, the sign from the code.
#pragma once
#include "common/amx.h"
#include "quant_matmul/cpu_quant_decode.h"

#if defined(__AVX512F__)
namespace {

struct FloatBytes {
  __m512i low[2], high[2];

  explicit FloatBytes(const QuantWeight& w) {
    tables([&](int i) { return number(w, i); }, low, high);
  }
  // Of a code in the top bits of a byte, without its sign.
  static uint16_t number(const QuantWeight& w, int byte) {
    uint32_t bits = 0;
    if (w.table) __builtin_memcpy(&bits, w.table + (byte >> (8 - w.bits)), 4);
    return uint16_t(bits >> 16);
  }
  template <class Number>
  static void tables(const Number& number, __m512i (&low)[2], __m512i (&high)[2]) {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) bytes[0][i] = uint8_t(number(i)), bytes[1][i] = uint8_t(number(i) >> 8);
    for (int i = 0; i < 2; ++i)
      low[i] = _mm512_load_si512(bytes[0] + 64 * i), high[i] = _mm512_load_si512(bytes[1] + 64 * i);
  }
  // Bytes are put together in quarters of a vector: the first vector has columns 0 to 7 of each 16.
  void operator()(__m512i codes, __m512i (&numbers)[2]) const {
    const __m512i rest = from_bytes(codes, low[0], low[1]), sign = _mm512_set1_epi8(char(0x80));
    const __m512i top = _mm512_ternarylogic_epi64(codes, sign, from_bytes(codes, high[0], high[1]), 0x6a);
    numbers[0] = _mm512_unpacklo_epi8(rest, top), numbers[1] = _mm512_unpackhi_epi8(rest, top);
  }
};

}  // namespace
#endif
