// scalekern_native::fft_conv_fwd_cpu, fft_conv_bwd_cpu and fft_conv_spectrum_cpu: plans of transforms, tensors to
// pointers, then the kernels of this machine's ISA.
#include <cmath>
#include <list>
#include <memory>
#include <mutex>
#include <numbers>
#include <vector>

#include "common/tensor.h"
#include "fft_conv/fft_conv.h"

namespace {

using namespace scalekern;

struct Plan : FftPlan {
  const int lanes;  // of the level that the plan is for
  std::vector<float> numbers;

  static std::vector<int> radices(int64_t parts) {
    std::vector<int> found;
    for (int odd : {5, 3})
      if (parts % odd == 0) found.push_back(odd), parts /= odd;
    int exponent = 0;
    while (parts > 1) parts /= 2, ++exponent;
    int fours = exponent % 3 == 2 ? 1 : exponent % 3 == 1 && exponent > 1 ? 2 : 0;
    if (exponent == 1) found.push_back(2), exponent = 0;
    for (exponent -= 2 * fours; exponent > 0; exponent -= 3) found.push_back(8);
    for (; fours; --fours) found.push_back(4);
    return found;
  }

  Plan(int64_t n, int lanes) : FftPlan{}, lanes(lanes) {
    const int64_t leaf = int64_t(lanes) * lanes;
    const auto chosen = radices(n / leaf);
    size = n, levels = int(chosen.size());
    for (int i = 0; i < levels; ++i) radix[i] = chosen[size_t(i)];
    pitch = child_size(*this) + (child_size(*this) >= 2048 ? lanes : 0);
    const auto put = [&](double turns) {
      const double angle = 2 * std::numbers::pi * turns;
      numbers.push_back(float(std::cos(angle))), numbers.push_back(float(std::sin(angle)));
    };
    size_t starts[kMost + 1];
    std::vector<double> fractions{0.25};  // f of the blocks of a level
    for (int level = 0; level < levels; ++level) {
      starts[level] = numbers.size();
      std::vector<double> next;
      for (double f : fractions) {
        for (int m = 1; m < radix[level]; ++m) put(f * m / radix[level]);
        for (int j = 0; j < radix[level]; ++j) next.push_back((f + j) / radix[level]);
      }
      fractions = next;
    }
    starts[levels] = numbers.size();
    for (double f : fractions) {
      for (int m = 1; m < lanes; ++m) put(f * m / lanes);
      for (int p = 1; p < lanes; ++p)
        for (int part = 0; part < 2; ++part)
          for (int j = 0; j < lanes; ++j) {
            const double angle = 2 * std::numbers::pi * p * (f + j) / double(leaf);
            numbers.push_back(float(part ? std::sin(angle) : std::cos(angle)));
          }
    }
    for (int level = 0; level <= levels; ++level) twiddles[level] = numbers.data() + starts[level];
  }
};

// The least good size: leaf times 2^a, 3 2^a or 5 2^a, at least two leaves.
int64_t good_size(int64_t least, int64_t leaf) {
  int64_t best = INT64_MAX;
  for (int64_t odd : {1, 3, 5}) {
    int64_t size = leaf * odd * (odd == 1 ? 2 : 1);
    while (size < least) size *= 2;
    best = size < best ? size : best;
  }
  return best;
}

// Plans of the last sizes that were asked for, as many as 64 MiB hold: one takes a little more than a spectrum, and as
// long as a few rows to make.
std::shared_ptr<const Plan> plan_of(int64_t n) {
  static std::mutex mutex;
  static std::list<std::shared_ptr<const Plan>> plans;
  constexpr size_t kKept = 16 << 20;  // numbers
  const int lanes = SCALEKERN_CALL(fft_lanes, ());
  const std::lock_guard lock(mutex);
  for (auto at = plans.begin(); at != plans.end(); ++at)
    if ((*at)->size == n && (*at)->lanes == lanes) {
      plans.splice(plans.begin(), plans, at);
      return plans.front();
    }
  plans.push_front(std::make_shared<const Plan>(n, lanes));
  size_t total = 0;
  for (auto at = plans.begin(); at != plans.end(); ++at) {
    total += (*at)->numbers.size();
    if (total <= kKept || at == plans.begin()) continue;
    plans.erase(at, plans.end());
    break;
  }
  return plans.front();
}

// (B, D, *), (D, *), (D,) with `channel` saying where D is.
Rows rows(const OptionalTensor& t) {
  if (!t.has_value()) return {};
  const int64_t dims = t->dim();
  if (dims == 1) return {t->data_ptr(), 0, t->stride(0), 0};
  if (dims == 2) return {t->data_ptr(), 0, t->stride(0), t->stride(1)};
  return {t->data_ptr(), t->stride(0), t->stride(1), t->stride(2)};
}
Rows rows_of_mask(const OptionalTensor& t) {
  if (!t.has_value()) return {};
  return {t->data_ptr(), t->stride(0), 0, t->stride(1)};
}

int64_t taps_of(const OptionalTensor& k) { return k.has_value() ? k->size(k->dim() - 1) : 0; }

FftConvArgs arguments(
    const Tensor& u, const Tensor& k, const OptionalTensor& k_reverse, const OptionalTensor& skip,
    const OptionalTensor& bias, const OptionalTensor& pregate, const OptionalTensor& postgate,
    const OptionalTensor& mask, const OptionalTensor& spectrum, int64_t offset, int64_t count) {
  FftConvArgs a{};
  a.batch = u.size(0), a.channels = u.size(1), a.length = u.size(2), a.count = count, a.offset = offset;
  a.taps = taps_of(k), a.reverse_taps = taps_of(k_reverse), a.spectrum = rows(spectrum);
  a.per_sample = k.dim() == 3 || (k_reverse.has_value() && k_reverse->dim() == 3);
  const Dtype io = dtype_of(u);
  a.io = io == Dtype::f32 ? Io::f32 : io == Dtype::f16 ? Io::f16 : Io::bf16;
  a.u = rows(u), a.k = rows(k), a.k_reverse = rows(k_reverse), a.skip = rows(skip), a.bias = rows(bias);
  a.pregate = rows(pregate), a.postgate = rows(postgate), a.mask = rows_of_mask(mask);
  return a;
}

// n: no wanted lag may meet one that is 2 n away (the composed backend's ring_of says the same).
int64_t transform_size(const FftConvArgs& a) {
  const int64_t ahead = std::min(a.taps - 1 - a.offset, a.count - 1);
  const int64_t behind = std::min(std::max(a.offset, a.reverse_taps - 1), a.length - 1);
  const int64_t least = std::max(ahead + a.length, a.count + behind), lanes = SCALEKERN_CALL(fft_lanes, ());
  return good_size((least + 1) / 2, lanes * lanes);
}

FftConvArgs geometry(int64_t length, int64_t count, int64_t taps, int64_t reverse_taps, int64_t offset) {
  FftConvArgs a{};
  a.length = length, a.count = count, a.taps = taps, a.reverse_taps = reverse_taps, a.offset = offset;
  return a;
}

// How many floats a spectrum takes.
int64_t spectrum_size(int64_t length, int64_t count, int64_t taps, int64_t reverse_taps, int64_t offset) {
  return spectrum_floats(*plan_of(transform_size(geometry(length, count, taps, reverse_taps, offset))));
}

void fft_conv_spectrum(
    Tensor spectrum, Tensor k, OptionalTensor k_reverse, int64_t length, int64_t count, int64_t offset) {
  FftConvArgs a = geometry(length, count, taps_of(k), taps_of(k_reverse), offset);
  const int64_t dims = spectrum.dim();
  a.batch = dims == 3 ? spectrum.size(0) : 1, a.channels = spectrum.size(dims - 2);
  const auto plan = plan_of(transform_size(a));
  a.plan = plan.get(), a.k = rows(k), a.k_reverse = rows(k_reverse), a.spectrum = rows(spectrum);
  expect_writes(spectrum);
  SCALEKERN_CALL(fft_conv_spectrum, (a));
}

void fft_conv_fwd(
    Tensor out, Tensor bad, Tensor u, Tensor k, OptionalTensor k_reverse, OptionalTensor skip, OptionalTensor bias,
    OptionalTensor pregate, OptionalTensor postgate, OptionalTensor mask, OptionalTensor spectrum, int64_t offset) {
  FftConvArgs a = arguments(u, k, k_reverse, skip, bias, pregate, postgate, mask, spectrum, offset, out.size(2));
  const auto plan = plan_of(transform_size(a));
  a.plan = plan.get(), a.out = rows(out), a.bad = {bad.data_ptr(), bad.stride(0), bad.stride(1), 0};
  expect_writes(out);
  SCALEKERN_CALL(fft_conv_fwd, (a));
}

// The gradients of what is absent are None, whatever tensors stand for them in the op's result.
void fft_conv_bwd(
    Tensor du, Tensor dk, OptionalTensor dk_reverse, OptionalTensor dskip, OptionalTensor dbias,
    OptionalTensor dpregate, OptionalTensor dpostgate, Tensor bad, Tensor dout, Tensor u, Tensor k,
    OptionalTensor k_reverse, OptionalTensor skip, OptionalTensor bias, OptionalTensor pregate, OptionalTensor postgate,
    OptionalTensor mask, OptionalTensor spectrum, int64_t offset) {
  FftConvArgs a = arguments(u, k, k_reverse, skip, bias, pregate, postgate, mask, spectrum, offset, dout.size(2));
  const auto plan = plan_of(transform_size(a));
  a.plan = plan.get(), a.dout = rows(dout), a.bad = {bad.data_ptr(), bad.stride(0), bad.stride(1), 0};
  a.du = rows(du), a.dk = rows(dk), a.dk_reverse = rows(dk_reverse), a.dskip = rows(dskip), a.dbias = rows(dbias);
  a.dpregate = rows(dpregate), a.dpostgate = rows(dpostgate);
  expect_writes(du), expect_writes(dk);
  SCALEKERN_CALL(fft_conv_bwd, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def("fft_conv_spectrum_size(int length, int count, int taps, int reverse_taps, int offset) -> int");
  m.def(
      "fft_conv_spectrum_cpu(Tensor(a!) spectrum, Tensor k, Tensor? k_reverse, int length, int count, int offset) "
      "-> ()");
  m.def(
      "fft_conv_fwd_cpu(Tensor(a!) out, Tensor(b!) bad, Tensor u, Tensor k, Tensor? k_reverse, Tensor? skip, "
      "Tensor? bias, Tensor? pregate, Tensor? postgate, Tensor? mask, Tensor? spectrum, int offset) -> ()");
  m.def(
      "fft_conv_bwd_cpu(Tensor(a!) du, Tensor(b!) dk, Tensor(c!)? dk_reverse, Tensor(d!)? dskip, Tensor(e!)? dbias, "
      "Tensor(f!)? dpregate, Tensor(g!)? dpostgate, Tensor(h!) bad, Tensor dout, Tensor u, Tensor k, "
      "Tensor? k_reverse, Tensor? skip, Tensor? bias, Tensor? pregate, Tensor? postgate, Tensor? mask, "
      "Tensor? spectrum, int offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CompositeExplicitAutograd, m) {
  m.impl("fft_conv_spectrum_size", TORCH_BOX(&spectrum_size));
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("fft_conv_spectrum_cpu", TORCH_BOX(&fft_conv_spectrum));
  m.impl("fft_conv_fwd_cpu", TORCH_BOX(&fft_conv_fwd));
  m.impl("fft_conv_bwd_cpu", TORCH_BOX(&fft_conv_bwd));
}
