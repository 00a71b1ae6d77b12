// scalekern_native::cross_scan_cpu and cross_merge_cpu: tensors to pointers and strides.
#include "common/tensor.h"
#include "selective_scan/cross_scan.h"

namespace {

using namespace scalekern;

CrossArgs arguments(
    const Tensor& out, const Tensor& in, const Tensor& lines, const Tensor& image, int64_t code, bool grouped) {
  CrossArgs a{data(in), data(out), int(dtype_of(in))};
  a.batch = in.size(0), a.directions = lines.size(1), a.channels = lines.size(2);
  a.rows = image.size(2), a.columns = image.size(3), a.code = code, a.grouped = grouped;
  for (int i = 0; i < 4; ++i) a.s[i] = in.stride(i);
  expect_writes(out);
  return a;
}

void cross_scan(Tensor out, Tensor x, int64_t code, bool grouped) {
  SCALEKERN_CALL(cross_scan, (arguments(out, x, out, x, code, grouped)));
}

void cross_merge(Tensor out, Tensor y, int64_t code, bool grouped) {
  SCALEKERN_CALL(cross_merge, (arguments(out, y, y, out, code, grouped)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def("cross_scan_cpu(Tensor(a!) out, Tensor x, int directions, bool grouped) -> ()");
  m.def("cross_merge_cpu(Tensor(a!) out, Tensor y, int directions, bool grouped) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("cross_scan_cpu", TORCH_BOX(&cross_scan));
  m.impl("cross_merge_cpu", TORCH_BOX(&cross_merge));
}
