// scalekern_native::depthwise_conv2d_cpu and depthwise_conv2d_dw_cpu: tensors to pointers and strides.
#include "common/tensor.h"
#include "fft_conv/depthwise.h"

namespace {

using namespace scalekern;

Images images(const Tensor& t) {
  return {data(t), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

DepthwiseArgs arguments(
    const Tensor& large, const Tensor& small, const Tensor& w, int64_t top, int64_t left, int64_t rows,
    int64_t columns) {
  DepthwiseArgs a{};
  a.batch = large.size(0), a.channels = large.size(1), a.dtype = int(dtype_of(large));
  a.large = images(large), a.small = images(small), a.w = data(w);
  a.taps[0] = w.size(1), a.taps[1] = w.size(2), a.start[0] = top, a.start[1] = left;
  a.dilation[0] = rows, a.dilation[1] = columns;
  return a;
}

void conv(
    Tensor out, Tensor source, Tensor w, OptionalTensor bias, int64_t top, int64_t left, int64_t rows, int64_t columns,
    bool flipped) {
  expect_writes(out);
  DepthwiseArgs a = arguments(source, out, w, top, left, rows, columns);
  a.bias = data(bias), a.flipped = flipped;
  SCALEKERN_CALL(depthwise_conv, (a));
}

void dw(Tensor dw, Tensor large, Tensor small, int64_t top, int64_t left, int64_t rows, int64_t columns) {
  SCALEKERN_CALL(depthwise_dw, (arguments(large, small, dw, top, left, rows, columns)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "depthwise_conv2d_cpu(Tensor(a!) out, Tensor source, Tensor w, Tensor? bias, int top, int left, int rows, "
      "int columns, bool flipped) -> ()");
  m.def(
      "depthwise_conv2d_dw_cpu(Tensor(a!) dw, Tensor large, Tensor small, int top, int left, int rows, int columns) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("depthwise_conv2d_cpu", TORCH_BOX(&conv));
  m.impl("depthwise_conv2d_dw_cpu", TORCH_BOX(&dw));
}
