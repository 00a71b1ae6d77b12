// scalekern_native::quant_matmul_fwd_cpu and _bwd_cpu: arguments for the kernels of this machine's ISA.
#include "common/tensor.h"
#include "quant_matmul/quant_matmul.h"

namespace {

using namespace scalekern;
using torch::headeronly::ScalarType;

QuantDtype quant_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return QuantDtype::f64;
    case ScalarType::Half: return QuantDtype::f16;
    case ScalarType::BFloat16: return QuantDtype::bf16;
    case ScalarType::Float8_e4m3fn: return QuantDtype::e4m3;
    case ScalarType::Float8_e8m0fnu: return QuantDtype::e8m0;
    case ScalarType::Char: return QuantDtype::i8;
    case ScalarType::Byte: return QuantDtype::u8;
    default: return QuantDtype::f32;
  }
}

// A matrix, or a vector as a row.
QuantPart part(const Tensor& t) {
  const bool vector = t.dim() == 1;
  const int64_t rows = vector ? 1 : t.size(0);
  return {t.data_ptr(), quant_dtype(t), rows == 1 ? 0 : t.stride(0), t.stride(vector ? 0 : 1)};
}
QuantPart part(const OptionalTensor& t) { return t.has_value() ? part(*t) : QuantPart{}; }

QuantWeight weight(
    const Tensor& data, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
    const OptionalTensor& outer, const OptionalTensor& table, int64_t columns, int64_t bits, double step, double base,
    int64_t mantissa, double zero, int64_t group_size) {
  QuantWeight w{};
  w.data = static_cast<const uint8_t*>(data.data_ptr()), w.pitch = data.stride(0);
  w.rows = data.size(0), w.columns = columns, w.group = group_size, w.groups = scales.size(1);
  w.bits = int(bits), w.step = float(step), w.base = float(base), w.mantissa = int(mantissa), w.zero = float(zero);
  w.table = static_cast<const float*>(scalekern::data(table));
  w.scales = part(scales), w.zeros = part(zeros), w.offsets = part(offsets), w.outer = part(outer);
  return w;
}

void forward(
    Tensor out, Tensor x, Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets,
    OptionalTensor outer, OptionalTensor bias, OptionalTensor table, int64_t bits, double step, double base,
    int64_t mantissa, double zero, int64_t group_size, double activation_max, double activation_scale) {
  expect_writes(out);
  QuantMatmulArgs a{};
  a.w = weight(data, scales, zeros, offsets, outer, table, x.size(1), bits, step, base, mantissa, zero, group_size);
  a.tokens = x.size(0), a.x = part(x), a.out = part(out), a.bias = part(bias);
  a.activation_max = float(activation_max), a.activation_scale = float(activation_scale);
  if (a.integer()) SCALEKERN_CALL(quant_matmul_integer, (a));
  else SCALEKERN_CALL(quant_matmul_float, (a));
}

void backward(
    Tensor dx, Tensor dout, Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets,
    OptionalTensor outer, OptionalTensor table, int64_t bits, double step, double base, int64_t mantissa, double zero,
    int64_t group_size) {
  expect_writes(dx);
  QuantMatmulBwdArgs a{};
  a.w = weight(data, scales, zeros, offsets, outer, table, dx.size(1), bits, step, base, mantissa, zero, group_size);
  a.tokens = dout.size(0), a.dout = part(dout), a.dx = part(dx);
  SCALEKERN_CALL(quant_matmul_bwd, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "quant_matmul_fwd_cpu(Tensor(a!) out, Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, "
      "Tensor? outer, Tensor? bias, Tensor? table, int bits, float step, float base, int mantissa, float zero, "
      "int group_size, float activation_max, float activation_scale) -> ()");
  m.def(
      "quant_matmul_bwd_cpu(Tensor(a!) dx, Tensor dout, Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, "
      "Tensor? outer, Tensor? table, int bits, float step, float base, int mantissa, float zero, int group_size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("quant_matmul_fwd_cpu", TORCH_BOX(&forward));
  m.impl("quant_matmul_bwd_cpu", TORCH_BOX(&backward));
}
