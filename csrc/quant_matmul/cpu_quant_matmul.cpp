// scalekern_native::quant_matmul_fwd_cpu and _bwd_cpu: arguments for the kernels of this machine's ISA.
// powers: scales are the bytes of float8_e8m0fnu, which torch's stable ABI does not know.
#include <cstring>
#include <vector>

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
    case ScalarType::Char: return QuantDtype::i8;
    case ScalarType::Byte: return QuantDtype::u8;
    default: return QuantDtype::f32;
  }
}

// Of a matrix; a vector is a row, and what has more axes is contiguous.
int64_t rows_of(const Tensor& t) { return t.dim() == 2 ? t.size(0) : t.numel() / t.size(-1); }
QuantPart part(const Tensor& t) {
  return {t.data_ptr(), quant_dtype(t), rows_of(t) == 1 ? 0 : t.stride(-2), t.stride(-1)};
}
QuantPart part(const OptionalTensor& t) { return t.has_value() ? part(*t) : QuantPart{}; }

QuantWeight weight(
    const Tensor& data, const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& offsets,
    const OptionalTensor& outer, const OptionalTensor& table, int64_t columns, int64_t bits, double step, double base,
    int64_t mantissa, double zero, int64_t group_size, bool powers) {
  QuantWeight w{};
  w.data = static_cast<const uint8_t*>(data.data_ptr()), w.pitch = data.stride(0);
  w.rows = data.size(0), w.columns = columns, w.group = group_size, w.groups = scales.size(1);
  w.bits = int(bits), w.step = float(step), w.base = float(base), w.mantissa = int(mantissa), w.zero = float(zero);
  w.table = static_cast<const float*>(scalekern::data(table));
  w.scales = part(scales), w.zeros = part(zeros), w.offsets = part(offsets), w.outer = part(outer);
  if (powers) w.scales.dtype = QuantDtype::e8m0;
  return w;
}

// run(e, its first token, their number) for each expert; a call without offs has one.
template <class Run>
void for_experts(const OptionalTensor& offs, int64_t tokens, Run run) {
  if (!offs.has_value()) return run(0, 0, tokens);
  const int32_t* ends = static_cast<const int32_t*>(offs->data_ptr());
  for (int64_t e = 0, first = 0; e < offs->size(0); first = ends[e++])
    if (ends[e] > first) run(e, first, ends[e] - first);
}

QuantMatmulArgs described(
    const QuantWeight& w, const OptionalTensor& bias, double activation_max, double activation_scale) {
  QuantMatmulArgs a{};
  a.w = w, a.bias = part(bias);
  a.activation_max = float(activation_max), a.activation_scale = float(activation_scale);
  return a;
}

void multiply(const QuantMatmulArgs& a) {
  if (a.integer()) SCALEKERN_CALL(quant_matmul_integer, (a));
  else SCALEKERN_CALL(quant_matmul_float, (a));
}

void forward(
    Tensor out, Tensor x, Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets,
    OptionalTensor outer, OptionalTensor bias, OptionalTensor offs, OptionalTensor table, int64_t bits, double step,
    double base, int64_t mantissa, double zero, int64_t group_size, bool powers, double activation_max,
    double activation_scale) {
  expect_writes(out);
  QuantMatmulArgs a = described(
      weight(data, scales, zeros, offsets, outer, table, x.size(-1), bits, step, base, mantissa, zero, group_size,
             powers),
      bias, activation_max, activation_scale);
  a.tokens = rows_of(x), a.x = part(x), a.out = part(out);
  for_experts(offs, a.tokens, [&, rows = out.size(-1)](int64_t e, int64_t first, int64_t tokens) {
    QuantMatmulArgs own = a;
    own.w = a.w.from(e * rows, rows), own.tokens = tokens, own.x = a.x.from(first), own.out = a.out.from(first);
    own.bias = a.bias.behind(e * rows * a.bias.column);
    multiply(own);
  });
}

// The arguments of a weight as the bytes of a struct, addresses in it: reading 9 tensors and 9 numbers anew takes 7 us
// a call, more than a small product.
Tensor keep(
    Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets, OptionalTensor outer, OptionalTensor bias,
    OptionalTensor table, int64_t columns, int64_t bits, double step, double base, int64_t mantissa, double zero,
    int64_t group_size, bool powers, double activation_max, double activation_scale) {
  const QuantMatmulArgs a = described(
      weight(data, scales, zeros, offsets, outer, table, columns, bits, step, base, mantissa, zero, group_size, powers),
      bias, activation_max, activation_scale);
  Tensor bytes = torch::stable::new_empty(data, {int64_t(sizeof a)}, ScalarType::Byte);
  std::memcpy(bytes.data_ptr(), &a, sizeof a);
  return bytes;
}

// Memory for a contiguous tensor of x's shape but for its last size; past the dispatcher, 0.6 us and not 2.
Tensor like_but_last(const Tensor& x, int64_t last) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(dims, 1);
  sizes.back() = last;
  for (int64_t d = dims - 1; d-- > 0;) strides[d] = strides[d + 1] * sizes[d + 1];
  int32_t dtype;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// x (..., K) with such a weight, in memory of its own; nothing, and nothing computed, of an x that no kernel reads.
std::optional<Tensor> with_kept(Tensor x, Tensor kept) {
  QuantMatmulArgs a;
  std::memcpy(&a, kept.data_ptr(), sizeof a);
  const int64_t dims = x.dim();
  const ScalarType dtype = x.scalar_type();
  const bool reads = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (!reads || dims < 1 || x.size(dims - 1) != a.w.columns || !x.numel() || !(dims == 2 || x.is_contiguous()))
    return std::nullopt;
  Tensor out = like_but_last(x, a.w.rows);
  expect_writes(out);
  a.tokens = rows_of(x), a.x = part(x), a.out = part(out);
  multiply(a);
  return out;
}

// The same with each of several weights; nothing where one of them does not read x.
std::vector<Tensor> with_each(Tensor x, std::vector<Tensor> kept) {
  std::vector<Tensor> found;
  for (const Tensor& own : kept) {
    std::optional<Tensor> out = with_kept(x, own);
    if (!out.has_value()) return {};
    found.push_back(*out);
  }
  return found;
}

void backward(
    Tensor dx, Tensor dout, Tensor data, Tensor scales, OptionalTensor zeros, OptionalTensor offsets,
    OptionalTensor outer, OptionalTensor offs, OptionalTensor table, int64_t bits, double step, double base,
    int64_t mantissa, double zero, int64_t group_size, bool powers) {
  expect_writes(dx);
  QuantMatmulBwdArgs a{};
  a.w = weight(data, scales, zeros, offsets, outer, table, dx.size(1), bits, step, base, mantissa, zero, group_size,
               powers);
  a.tokens = dout.size(0), a.dout = part(dout), a.dx = part(dx);
  for_experts(offs, a.tokens, [&, rows = dout.size(1)](int64_t e, int64_t first, int64_t tokens) {
    QuantMatmulBwdArgs own = a;
    own.w = a.w.from(e * rows, rows), own.tokens = tokens, own.dout = a.dout.from(first), own.dx = a.dx.from(first);
    SCALEKERN_CALL(quant_matmul_bwd, (own));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "quant_matmul_fwd_cpu(Tensor(a!) out, Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, "
      "Tensor? outer, Tensor? bias, Tensor? offs, Tensor? table, int bits, float step, float base, int mantissa, float zero, "
      "int group_size, bool powers, float activation_max, float activation_scale) -> ()");
  m.def(
      "quant_matmul_keep_cpu(Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? outer, Tensor? bias, "
      "Tensor? table, int columns, int bits, float step, float base, int mantissa, float zero, int group_size, "
      "bool powers, float activation_max, float activation_scale) -> Tensor");
  m.def("quant_matmul_kept_cpu(Tensor x, Tensor kept) -> Tensor?");
  m.def("quant_matmul_kept_together_cpu(Tensor x, Tensor[] kept) -> Tensor[]");
  m.def(
      "quant_matmul_bwd_cpu(Tensor(a!) dx, Tensor dout, Tensor data, Tensor scales, Tensor? zeros, Tensor? offsets, "
      "Tensor? outer, Tensor? offs, Tensor? table, int bits, float step, float base, int mantissa, float zero, int group_size, "
      "bool powers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("quant_matmul_fwd_cpu", TORCH_BOX(&forward));
  m.impl("quant_matmul_keep_cpu", TORCH_BOX(&keep));
  m.impl("quant_matmul_kept_cpu", TORCH_BOX(&with_kept));
  m.impl("quant_matmul_kept_together_cpu", TORCH_BOX(&with_each));
  m.impl("quant_matmul_bwd_cpu", TORCH_BOX(&backward));
}
