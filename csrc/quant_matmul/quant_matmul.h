// Arguments of the products with low-bit weights, shared by the op and its per-ISA kernels.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace scalekern {

// What a part of a weight, a bias or an activation is stored as.
enum class QuantDtype : int { f32, f64, f16, bf16, e4m3, e8m0, i8, u8 };

// A matrix of any of those types; strides in elements, 0 where all rows share one. No data: absent.
struct QuantPart {
  const void* data = nullptr;
  QuantDtype dtype = QuantDtype::f32;
  int64_t row = 0, column = 0;

  // The same from its r-th row on, or from another element on.
  QuantPart from(int64_t r) const { return behind(r * row); }
  QuantPart behind(int64_t elements) const {
    static constexpr int kBytes[] = {4, 8, 2, 2, 1, 1, 1, 1};
    QuantPart rest = *this;
    if (data) rest.data = static_cast<const char*>(data) + elements * kBytes[int(dtype)];
    return rest;
  }
};

// Shape letters: N rows, K columns, G groups of columns.
//
//   w[n, k] = outer[n] (scales[n, g] (value(code[n, k]) - zeros[n, g]) + offsets[n, g])
//
// value(code) = step code + base, or table[code]. The codes of a row are a stream of bits, the lowest first.
struct QuantWeight {
  const uint8_t* data;
  int64_t pitch;  // bytes from row to row
  int64_t rows, columns, group, groups;
  int bits;
  float step, base;     // of a format without a table
  const float* table;   // (2^bits,), null for a format of step and base
  int mantissa;         // bits of a table that is a small float's (8 or 6 bits), else 0
  float zero;           // where there are no zeros
  QuantPart scales, zeros, offsets, outer;

  // Whether w is more than scale (code - middle).
  bool has_rest(float middle) const { return zeros.data || offsets.data || (zero - base) / step != middle; }
  // `count` rows from the r-th on.
  QuantWeight from(int64_t r, int64_t count) const {
    QuantWeight some = *this;
    some.data += r * pitch, some.rows = count;
    some.scales = scales.from(r), some.zeros = zeros.from(r), some.offsets = offsets.from(r),
    some.outer = outer.from(r);
    return some;
  }
  int64_t row_bytes() const { return (columns * bits + 7) / 8; }
};

// out = act(x) w^T + bias. M tokens.
struct QuantMatmulArgs {
  QuantWeight w;
  int64_t tokens;
  QuantPart x, out;  // out: (M, N)
  QuantPart bias;    // (N,): column
  float activation_max;    // 127, 7, 448 (float8_e4m3), 0: x as it is
  float activation_scale;  // of all tokens, 0: each token's largest magnitude by activation_max

  bool integer() const { return w.table == nullptr && (activation_max == 127 || activation_max == 7); }
};

// dx = dout w; no rounding of activations has a part in it.
struct QuantMatmulBwdArgs {
  QuantWeight w;
  int64_t tokens;
  QuantPart dout, dx;  // (M, N), (M, K)
};

}  // namespace scalekern

SCALEKERN_DECLARE(void, quant_matmul_float, (const scalekern::QuantMatmulArgs&))
SCALEKERN_DECLARE(void, quant_matmul_integer, (const scalekern::QuantMatmulArgs&))
// In fixed point, of up to 4 tokens: those that it holds get digits[t], the others 0; false where the codes do not fit.
// On avx512 alone.
SCALEKERN_DECLARE(bool, quant_matmul_digits, (const scalekern::QuantMatmulArgs&, int* digits))
SCALEKERN_DECLARE(void, quant_matmul_bwd, (const scalekern::QuantMatmulBwdArgs&))
