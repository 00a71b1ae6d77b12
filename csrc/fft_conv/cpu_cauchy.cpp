// scalekern_native::cauchy_sums_cpu, cauchy_sums_bwd_cpu: tensors to pointers, then the kernels of this machine's ISA.
#include "common/tensor.h"
#include "fft_conv/cauchy.h"

namespace {

using namespace scalekern;

CauchyArgs arguments(const Tensor& z, const Tensor& products, const Tensor& cosine, const Tensor& sine, bool pairs) {
  CauchyArgs args{};
  args.heads = products.size(0), args.states = products.size(1), args.products = products.size(2);
  args.count = cosine.size(0), args.pairs = pairs;
  args.z = static_cast<const double*>(data(z)), args.products_of = static_cast<const double*>(data(products));
  args.cosine = static_cast<const double*>(data(cosine)), args.sine = static_cast<const double*>(data(sine));
  return args;
}

void cauchy_sums(Tensor sums, Tensor z, Tensor products, Tensor cosine, Tensor sine, bool pairs) {
  CauchyArgs args = arguments(z, products, cosine, sine, pairs);
  args.sums = static_cast<double*>(data(sums));
  SCALEKERN_CALL(cauchy_sums, (args));
}

void cauchy_sums_bwd(
    Tensor dproducts, Tensor square, Tensor dsums, Tensor z, Tensor products, Tensor cosine, Tensor sine, bool pairs) {
  CauchyArgs args = arguments(z, products, cosine, sine, pairs);
  args.dsums = static_cast<const double*>(data(dsums));
  args.dproducts = static_cast<double*>(data(dproducts)), args.square = static_cast<double*>(data(square));
  SCALEKERN_CALL(cauchy_sums_bwd, (args));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def("cauchy_sums_cpu(Tensor(a!) sums, Tensor z, Tensor products, Tensor cosine, Tensor sine, bool pairs) -> ()");
  m.def(
      "cauchy_sums_bwd_cpu(Tensor(a!) dproducts, Tensor(b!) square, Tensor dsums, Tensor z, Tensor products, "
      "Tensor cosine, Tensor sine, bool pairs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("cauchy_sums_cpu", TORCH_BOX(&cauchy_sums));
  m.impl("cauchy_sums_bwd_cpu", TORCH_BOX(&cauchy_sums_bwd));
}
