// scalekern_native::fft_conv_cuda, fft_filters_cuda
#include "common/cuda_launch.h"
#include "fft_conv/cuda_fft_conv_driver.h"

namespace {

using namespace scalekern;

void fft_conv(
    Tensor out, Tensor u, OptionalTensor pregate, OptionalTensor postgate, OptionalTensor mask,
    OptionalTensor bias, Tensor scale, Tensor spectrum, Tensor tables, int64_t points) {
  Exec exec(u);
  fft::fft_conv(exec, view(out), view(u), view(pregate), view(postgate), view(mask), view(bias), view(scale),
                view(spectrum), view(tables), points);
}

void fft_filters(
    Tensor spectrum, Tensor scale, Tensor k, OptionalTensor k_reverse, OptionalTensor skip, int64_t offset,
    int64_t period, int64_t behind, int64_t ahead, int64_t points) {
  Exec exec(k);
  fft::fft_filters(exec, view(spectrum), view(scale), view(k), view(k_reverse), view(skip), offset, period, behind,
                   ahead, points);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "fft_conv_cuda(Tensor(a!) out, Tensor u, Tensor? pregate, Tensor? postgate, Tensor? mask, Tensor? bias, "
      "Tensor scale, Tensor spectrum, Tensor tables, int points) -> ()");
  m.def(
      "fft_filters_cuda(Tensor(a!) spectrum, Tensor(b!) scale, Tensor k, Tensor? k_reverse, Tensor? skip, int offset, "
      "int period, int behind, int ahead, int points) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("fft_conv_cuda", TORCH_BOX(&fft_conv));
  m.impl("fft_filters_cuda", TORCH_BOX(&fft_filters));
}
