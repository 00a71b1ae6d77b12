// scalekern_native::quant_matmul_gemv_cuda
#include "quant_matmul/cuda_quant_gemv_driver.h"
#include "quant_matmul/cuda_quant_views.h"

namespace {

using namespace scalekern;

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
