// scalekern_native::quantized_mamba_update_cpu: one decoding step of a Mamba mixer of low-bit weights, as a chain of
// the kernels of quant_matmul, hadamard_transform, causal_conv1d_update and selective_state_update in one call; a
// projection that is not of low bits, the step size's, and A are mamba_update's.
//
// Bound: at a width of a few hundred the calls themselves, which is why they are one; above, the weights' bytes.
// What is between the parts lies in one workspace. Threads are woken by parts that are worth it, none at width 128.
#include <vector>

#include "common/tensor.h"
#include "quant_matmul/hadamard.h"
#include "quant_matmul/quant_matmul.h"
#include "selective_scan/mamba_update.h"

namespace {

using namespace scalekern;

constexpr int64_t kAwake = 1 << 17;  // products of in_proj from which its threads have worked

// What ops/quantized_mamba_update.py writes about a projection, in this order: `powers` for scales that are the bytes
// of float8_e8m0fnu, 1 for a part that there is, 0 for one that is missing; `block` = m 2^k points of a rotation or 0.
struct Layout {
  double bits, step, base, mantissa, zero, group, columns, powers, zeros, offsets, outer, bias, table, block, m, k;
};

struct Projection {
  QuantMatmulArgs product{};      // of a low-bit weight,
  LinearArgs dense{};             // or without one
  HadamardArgs rotation{};        // rows, n, m, k
  const int8_t* flips = nullptr;  // the signs of the columns before the rotation
};

QuantDtype kind(const Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) return QuantDtype::e4m3;
  if (t.scalar_type() == ScalarType::Char) return QuantDtype::i8;
  if (t.scalar_type() == ScalarType::Byte) return QuantDtype::u8;
  return QuantDtype(int(dtype_of(t)));  // the floating ones have one order in both
}

QuantPart part(const Tensor& t) {
  const bool vector = t.dim() == 1;
  return {t.data_ptr(), kind(t), vector || t.size(0) == 1 ? 0 : t.stride(0), t.stride(vector ? 0 : 1)};
}

// Takes the projection's tensors from `next` on.
Projection projection(const Tensor*& next, const Layout& about, int64_t rows, int dtype, float max, float scale) {
  Projection p;
  const Tensor& data = *next++;
  const int64_t columns = int64_t(about.columns);
  const auto take = [&](double there) { return there ? part(*next++) : QuantPart{}; };
  if (about.bits == 0) {
    p.dense.rows = rows, p.dense.inputs = columns, p.dense.outputs = data.size(0), p.dense.dtype = dtype;
    p.dense.weight = data.data_ptr(), p.dense.weight_o = data.stride(0);
  } else {
    QuantWeight& w = p.product.w;
    w.data = static_cast<const uint8_t*>(data.data_ptr()), w.pitch = data.stride(0), w.rows = data.size(0);
    w.columns = columns, w.group = int64_t(about.group), w.groups = next->size(1), w.bits = int(about.bits);
    w.step = float(about.step), w.base = float(about.base);
    w.mantissa = int(about.mantissa), w.zero = float(about.zero);
    w.scales = take(1), w.zeros = take(about.zeros), w.offsets = take(about.offsets);
    w.outer = take(about.outer), p.product.bias = take(about.bias);
    w.table = static_cast<const float*>(take(about.table).data);
    if (about.powers) w.scales.dtype = QuantDtype::e8m0;
    p.product.tokens = rows, p.product.activation_max = max, p.product.activation_scale = scale;
  }
  if (about.block > 0) {
    HadamardArgs& h = p.rotation;
    p.flips = static_cast<const int8_t*>((next++)->data_ptr());
    h.n = int64_t(about.block), h.m = int64_t(about.m), h.k = int64_t(about.k), h.rows = rows * (columns / h.n);
    h.dtype = dtype, h.scale = 1 / __builtin_sqrt(about.block), h.axes = 1, h.size[0] = h.rows, h.stride[0] = h.n;
    h.stride_n = 1, h.signs = h.m > 1 ? static_cast<const int64_t*>((next++)->data_ptr()) : nullptr;
  }
  return p;
}

// to = x with the sign bits of the columns whose flip is negative turned.
template <class Bits>
void turn(const void* x, int64_t x_b, const int8_t* flips, int64_t rows, int64_t columns, void* to) {
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t k = 0; k < columns; ++k)
      static_cast<Bits*>(to)[b * columns + k] =
          static_cast<const Bits*>(x)[b * x_b + k] ^ Bits(Bits(flips[k] < 0) << (8 * sizeof(Bits) - 1));
}

struct Rows {
  void* data;
  int64_t pitch;
};

// out = the projection of x; `spare` holds two times its input.
void run(Projection& p, Rows x, Rows out, int dtype, char* spare) {
  const int64_t rows = p.flips ? p.rotation.rows * p.rotation.n : 0;
  if (p.flips) {
    const int64_t columns = p.dense.weight ? p.dense.inputs : p.product.w.columns;
    const int64_t item = dtype == int(Dtype::f32) ? 4 : 2;
    if (item == 4) turn<uint32_t>(x.data, x.pitch, p.flips, rows / columns, columns, spare);
    else turn<uint16_t>(x.data, x.pitch, p.flips, rows / columns, columns, spare);
    p.rotation.x = spare, p.rotation.out = spare + rows * item;
    SCALEKERN_CALL(hadamard, (p.rotation));
    x = {p.rotation.out, columns};
  }
  if (p.dense.weight) {
    p.dense.x = x.data, p.dense.x_b = x.pitch, p.dense.out = out.data, p.dense.out_b = out.pitch;
    SCALEKERN_CALL(linear, (p.dense));
    return;
  }
  p.product.x = {x.data, QuantDtype(dtype), x.pitch, 1}, p.product.out = {out.data, QuantDtype(dtype), out.pitch, 1};
  if (p.product.integer()) SCALEKERN_CALL(quant_matmul_integer, (p.product));
  else SCALEKERN_CALL(quant_matmul_float, (p.product));
}

void quantized_mamba_update(
    Tensor out, Tensor conv_state, Tensor ssm_state, Tensor hidden_states, Tensor conv1d_weight,
    OptionalTensor conv1d_bias, Tensor A_log, OptionalTensor D, OptionalTensor delta_bias, std::vector<Tensor> parts,
    Tensor layout, double activation_max, double activation_scale) {
  const int64_t batch = hidden_states.size(0), channels = A_log.size(0), states = A_log.size(1);
  const int64_t model = hidden_states.size(1), item = hidden_states.element_size();
  const int dtype = int(dtype_of(hidden_states));  // 0, 2 or 3, as of enum QuantDtype
  const Layout* about = static_cast<const Layout*>(data(layout));
  const Tensor* next = parts.data();
  const auto of = [&](int i, bool rounded) {
    return projection(next, about[i], batch, dtype, rounded ? float(activation_max) : 0, float(activation_scale));
  };
  Projection in_proj = of(0, true), x_proj = of(1, true), delta_proj = of(2, false), out_proj = of(3, true);
  const int64_t projected = x_proj.product.w.rows, rank = projected - 2 * states;
  const int64_t most = model > channels ? model : channels;
  const bool turned = in_proj.flips || x_proj.flips || delta_proj.flips || out_proj.flips;

  const auto bytes = [&](int64_t width) { return (batch * width * item + 63) / 64 * 64; };
  const int64_t decays = (channels * states * 4 + 63) / 64 * 64;
  const int64_t between = bytes(2 * channels) + bytes(projected) + 3 * bytes(channels);
  const int64_t total = decays + between + (turned ? 2 * bytes(most) : 0);
  const Tensor workspace = torch::stable::new_empty(hidden_states, {total}, torch::headeronly::ScalarType::Byte);
  char* free = static_cast<char*>(data(workspace));
  const auto take = [&](int64_t size) { return free += size, free - size; };
  float* A = reinterpret_cast<float*>(take(decays));
  char *xz = take(bytes(2 * channels)), *txbc = take(bytes(projected)), *x = take(bytes(channels));
  char *delta = take(bytes(channels)), *y = take(bytes(channels)), *spare = free;
  const bool awake = batch * 2 * channels * model >= kAwake;

  run(in_proj, {data(hidden_states), stride(hidden_states, 0)}, {xz, 2 * channels}, dtype, spare);

  ConvUpdateArgs c{};
  c.batch = batch, c.channels = channels, c.steps = 1, c.width = conv1d_weight.size(1), c.window = conv_state.size(2);
  c.dtype = dtype, c.state_dtype = int(dtype_of(conv_state)), c.silu = true, c.awake = awake;
  c.x = {xz, 2 * channels, 1, 0}, c.out = {x, channels, 1, 0};
  c.state = {data(conv_state), stride(conv_state, 0), stride(conv_state, 1), stride(conv_state, 2)};
  c.weight = {data(conv1d_weight), 0, stride(conv1d_weight, 0), stride(conv1d_weight, 1)};
  c.bias = {data(conv1d_bias), 0, stride(conv1d_bias, 0), 0};
  SCALEKERN_CALL(conv1d_update, (c));

  run(x_proj, {x, channels}, {txbc, projected}, dtype, spare);
  run(delta_proj, {txbc, projected}, {delta, channels}, dtype, spare);
  SCALEKERN_CALL(decay_rates, (static_cast<const float*>(data(A_log)), A, channels * states));

  StateUpdateArgs s{};
  s.batch = batch, s.heads = 1, s.dim = channels, s.states = states, s.heads_per_group = 1;
  s.io_dtype = dtype, s.state_dtype = int(dtype_of(ssm_state)), s.softplus = true, s.awake = awake;
  s.state = data(ssm_state), s.out = y, s.x = x, s.dt = delta, s.A = A;
  s.B = txbc + rank * item, s.C = txbc + (rank + states) * item, s.z = xz + channels * item;
  s.D = data(D), s.dt_bias = data(delta_bias), s.D_p = stride(D, 0), s.bias_p = stride(delta_bias, 0);
  s.state_s = stride(ssm_state, 0), s.state_p = stride(ssm_state, 1), s.state_n = stride(ssm_state, 2);
  s.x_b = s.dt_b = channels, s.z_b = 2 * channels, s.x_p = s.dt_p = s.z_p = 1;
  s.A_p = states, s.A_n = 1, s.B_b = s.C_b = projected, s.B_n = s.C_n = 1;
  SCALEKERN_CALL(selective_state_update, (s));

  run(out_proj, {y, channels}, {data(out), model}, dtype, spare);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "quantized_mamba_update_cpu(Tensor(a!) out, Tensor(b!) conv_state, Tensor(c!) ssm_state, Tensor hidden_states, "
      "Tensor conv1d_weight, Tensor? conv1d_bias, Tensor A_log, Tensor? D, Tensor? delta_bias, Tensor[] parts, "
      "Tensor layout, float activation_max, float activation_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) {
  m.impl("quantized_mamba_update_cpu", TORCH_BOX(&quantized_mamba_update));
}
