// Tensors of torch's stable ABI as the drivers of the CUDA products with low-bit weights take them.
#pragma once
#include "common/cuda_launch.h"
#include "quant_matmul/cuda_quant_parts.cuh"

namespace scalekern {

// powers: bytes that stand for float8_e8m0fnu, which torch's stable ABI does not know.
inline View part(const OptionalTensor& t, bool powers = false) {
  using torch::headeronly::ScalarType;
  View v = view(t);
  if (!t.has_value()) return v;
  switch (t->scalar_type()) {
    case ScalarType::Double: v.dtype = gemv::kF64; break;
    case ScalarType::Half: v.dtype = gemv::kF16; break;
    case ScalarType::BFloat16: v.dtype = gemv::kBf16; break;
    case ScalarType::Float8_e4m3fn: v.dtype = gemv::kE4m3; break;
    case ScalarType::Char: v.dtype = gemv::kI8; break;
    case ScalarType::Byte: v.dtype = powers ? gemv::kE8m0 : gemv::kU8; break;
    default: v.dtype = gemv::kF32;
  }
  return v;
}

}  // namespace scalekern
