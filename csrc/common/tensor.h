// What the op files of the stable-ABI libraries share: views of tensors as pointers and strides, and dtypes.
// Shapes and dtypes were checked in Python before a call comes here; nothing is checked twice.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/pages.h"

namespace scalekern {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Element types of the kernels, as an enum that needs no torch header.
enum class Dtype : int { f32, f64, f16, bf16, i32, i64, c64, c128, other };

inline Dtype dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Int: return Dtype::i32;
    case ScalarType::Long: return Dtype::i64;
    case ScalarType::ComplexFloat: return Dtype::c64;
    case ScalarType::ComplexDouble: return Dtype::c128;
    default: return Dtype::other;
  }
}

inline void expect_writes(const Tensor& t) { expect_writes(t.data_ptr(), t.numel() * t.element_size()); }

inline void* data(const Tensor& t) { return t.data_ptr(); }
inline void* data(const OptionalTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }
inline int64_t stride(const Tensor& t, int64_t dim) { return t.stride(dim); }
inline int64_t stride(const OptionalTensor& t, int64_t dim) { return t.has_value() ? t->stride(dim) : 0; }

}  // namespace scalekern
