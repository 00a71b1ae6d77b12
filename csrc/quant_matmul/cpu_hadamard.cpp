// scalekern_native::hadamard_transform_cpu and fused_hadamard_quantize_cpu: tensors to pointers.
#include "common/tensor.h"
#include "quant_matmul/hadamard.h"

namespace {

using namespace scalekern;

// x (..., n) with its leading axes as few axes as its strides allow.
HadamardArgs arguments(const Tensor& x, const OptionalTensor& signs, int64_t k, double scale) {
  HadamardArgs args{};
  const int64_t last = x.dim() - 1;
  args.x = data(x), args.dtype = int(dtype_of(x)), args.n = x.size(last), args.stride_n = x.stride(last);
  args.signs = static_cast<const int64_t*>(data(signs)), args.m = signs.has_value() ? signs->size(0) : 1;
  args.k = k, args.scale = scale, args.rows = 1;
  for (int64_t axis = 0; axis < last; ++axis) {
    const int64_t size = x.size(axis), stride = x.stride(axis);
    args.rows *= size;
    if (size == 1) continue;
    if (args.axes && args.stride[args.axes - 1] == size * stride) args.size[args.axes - 1] *= size;
    else args.size[args.axes++] = size;
    args.stride[args.axes - 1] = stride;
  }
  return args;
}

void hadamard_transform(Tensor out, Tensor x, OptionalTensor signs, int64_t k, double scale) {
  HadamardArgs args = arguments(x, signs, k, scale);
  args.out = data(out);
  expect_writes(out);
  SCALEKERN_CALL(hadamard, (args));
}

void fused_hadamard_quantize(
    Tensor q, Tensor scales, Tensor x, OptionalTensor signs, int64_t k, double scale, int64_t group, int64_t most) {
  HadamardArgs args = arguments(x, signs, k, scale);
  args.q = static_cast<int8_t*>(data(q)), args.scales = static_cast<float*>(data(scales));
  args.group = group, args.most = int(most);
  expect_writes(q);
  SCALEKERN_CALL(hadamard, (args));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def("hadamard_transform_cpu(Tensor(a!) out, Tensor x, Tensor? signs, int k, float scale) -> ()");
  m.def(
      "fused_hadamard_quantize_cpu(Tensor(a!) q, Tensor(b!) scales, Tensor x, Tensor? signs, int k, float scale, "
      "int group, int most) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("hadamard_transform_cpu", TORCH_BOX(&hadamard_transform));
  m.impl("fused_hadamard_quantize_cpu", TORCH_BOX(&fused_hadamard_quantize));
}
