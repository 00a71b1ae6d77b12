// scalekern_native::quant_matmul_gemv_cuda
#include "common/cuda_launch.h"
#include "quant_matmul/cuda_quant_gemv_driver.h"

namespace {

using namespace scalekern;

// powers: bytes that stand for float8_e8m0fnu, which torch's stable ABI does not know.
View part(const OptionalTensor& t, bool powers = false) {
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

void quant_matmul_gemv(
    Tensor out, Tensor x, Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets,
    OptionalTensor outer, OptionalTensor bias, OptionalTensor table, int64_t bits, double step, double base,
    double zero, int64_t group_size, bool powers) {
  Exec exec(x);
  gemv::quant_matmul_gemv(
      exec, part(out), part(x), part(data), part(scales, powers), part(zeros), part(offsets), part(outer), part(bias),
      part(table), bits, step, base, zero, group_size);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "quant_matmul_gemv_cuda(Tensor(a!) out, Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, "
      "Tensor? outer, Tensor? bias, Tensor? table, int bits, float step, float base, float zero, int group_size, "
      "bool powers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("quant_matmul_gemv_cuda", TORCH_BOX(&quant_matmul_gemv));
}
