// scalekern_native::quant_matmul_tiles_cuda
#include "quant_matmul/cuda_quant_tiles_driver.h"
#include "quant_matmul/cuda_quant_views.h"

namespace {

using namespace scalekern;

void quant_matmul_tiles(
    Tensor out, Tensor x, Tensor codes, Tensor scales, OptionalTensor shifts, OptionalTensor outer, OptionalTensor bias,
    int64_t bits, int64_t group_size) {
  Exec exec(x);
  tiles::quant_matmul_tiles(
      exec, part(out), part(x), part(codes), part(scales), part(shifts), part(outer), part(bias), bits, group_size);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "quant_matmul_tiles_cuda(Tensor(a!) out, Tensor x, Tensor codes, Tensor scales, Tensor? shifts, Tensor? outer, "
      "Tensor? bias, int bits, int group_size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CUDA, m) {
  m.impl("quant_matmul_tiles_cuda", TORCH_BOX(&quant_matmul_tiles));
}
