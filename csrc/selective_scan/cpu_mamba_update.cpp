// scalekern_native::mamba_update_cpu: the parts of the step as pointers and strides, then the kernel of this machine's
// ISA. All tensors are contiguous but for the two states, x's rows and the weights' rows.
#include "common/tensor.h"
#include "selective_scan/mamba_update.h"

namespace {

using namespace scalekern;

LinearArgs linear(const Tensor& weight, const void* bias, int64_t rows) {
  LinearArgs a{};
  a.rows = rows, a.inputs = weight.size(1), a.outputs = weight.size(0);
  a.dtype = int(dtype_of(weight));
  a.weight = data(weight), a.weight_o = stride(weight, 0), a.bias = bias;
  return a;
}

void mamba_update(
    Tensor out, Tensor conv_state, Tensor ssm_state, Tensor hidden_states, Tensor in_proj_weight,
    OptionalTensor in_proj_bias, Tensor conv1d_weight, OptionalTensor conv1d_bias, Tensor x_proj_weight,
    Tensor delta_proj_weight, Tensor out_proj_weight, OptionalTensor out_proj_bias, Tensor A_log, OptionalTensor D,
    OptionalTensor delta_bias, OptionalTensor norm_weight, double rms_eps, double norm_eps) {
  const int64_t batch = hidden_states.size(0), channels = A_log.size(0), states = A_log.size(1);
  const int64_t rank = delta_proj_weight.size(1), item = hidden_states.element_size();
  // Between the parts: xz, the projections of x (in it, B and C), x, delta, y, the normed hidden states, and A.
  const int64_t model = norm_weight.has_value() ? hidden_states.size(1) : 0;
  const int64_t widths[] = {2 * channels, x_proj_weight.size(0), channels, channels, channels, model};
  int64_t bytes = channels * states * A_log.element_size();
  for (int64_t width : widths) bytes += batch * width * item;
  const Tensor workspace =
      torch::stable::new_empty(hidden_states, {bytes}, torch::headeronly::ScalarType::Byte);
  char* next = static_cast<char*>(data(workspace)) + channels * states * A_log.element_size();
  const auto take = [&](int64_t width) {
    char* piece = next;
    next += batch * width * item;
    return piece;
  };
  char *xz = take(widths[0]), *projected = take(widths[1]), *x = take(channels), *delta = take(channels);
  char *y = take(channels), *normed = take(model);

  MambaUpdateArgs a{};
  a.in_proj = linear(in_proj_weight, data(in_proj_bias), batch);
  a.hidden = data(hidden_states), a.hidden_b = stride(hidden_states, 0);
  a.norm_weight = data(norm_weight), a.norm_eps = norm_eps, a.normed = normed;
  a.in_proj.x = a.norm_weight ? normed : a.hidden, a.in_proj.x_b = a.norm_weight ? model : a.hidden_b;
  a.in_proj.out = xz, a.in_proj.out_b = 2 * channels;

  ConvUpdateArgs& c = a.conv;
  c.batch = batch, c.channels = channels, c.steps = 1, c.width = conv1d_weight.size(1), c.window = conv_state.size(2);
  c.dtype = a.in_proj.dtype, c.state_dtype = int(dtype_of(conv_state)), c.silu = c.awake = true;
  c.x = {xz, 2 * channels, 1, 0}, c.out = {x, channels, 1, 0};
  c.state = {data(conv_state), stride(conv_state, 0), stride(conv_state, 1), stride(conv_state, 2)};
  c.weight = {data(conv1d_weight), 0, stride(conv1d_weight, 0), stride(conv1d_weight, 1)};
  c.bias = {data(conv1d_bias), 0, stride(conv1d_bias, 0), 0};

  a.x_proj = linear(x_proj_weight, nullptr, batch);
  a.x_proj.x = x, a.x_proj.x_b = channels, a.x_proj.out = projected, a.x_proj.out_b = widths[1];
  a.rank = rank, a.states = states, a.rms_eps = rms_eps;
  a.dt_proj = linear(delta_proj_weight, nullptr, batch);
  a.dt_proj.x = projected, a.dt_proj.x_b = widths[1], a.dt_proj.out = delta, a.dt_proj.out_b = channels;
  a.A_log = data(A_log), a.A = data(workspace);

  StateUpdateArgs& s = a.scan;
  s.batch = batch, s.heads = 1, s.dim = channels, s.states = states, s.heads_per_group = 1;
  s.io_dtype = c.dtype, s.state_dtype = int(dtype_of(ssm_state)), s.softplus = s.awake = true;
  s.state = data(ssm_state), s.out = y, s.x = x, s.dt = delta, s.A = a.A;
  s.B = projected + rank * item, s.C = projected + (rank + states) * item;
  s.z = xz + channels * item, s.D = data(D), s.dt_bias = data(delta_bias);
  s.state_s = stride(ssm_state, 0), s.state_p = stride(ssm_state, 1), s.state_n = stride(ssm_state, 2);
  s.x_b = s.dt_b = channels, s.z_b = 2 * channels, s.x_p = s.dt_p = s.z_p = 1;
  s.A_p = states, s.A_n = 1, s.B_b = s.C_b = widths[1], s.B_n = s.C_n = 1;
  s.D_p = stride(D, 0), s.bias_p = stride(delta_bias, 0);

  a.out_proj = linear(out_proj_weight, data(out_proj_bias), batch);
  a.out_proj.x = y, a.out_proj.x_b = channels, a.out_proj.out = data(out), a.out_proj.out_b = stride(out, 0);
  if (a.norm_weight) a.out_proj.residual = a.hidden, a.out_proj.residual_b = a.hidden_b;
  SCALEKERN_CALL(mamba_update, (a));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scalekern_native, m) {
  m.def(
      "mamba_update_cpu(Tensor(a!) out, Tensor(b!) conv_state, Tensor(c!) ssm_state, Tensor hidden_states, "
      "Tensor in_proj_weight, Tensor? in_proj_bias, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
      "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A_log, Tensor? D, "
      "Tensor? delta_bias, Tensor? norm_weight, float rms_eps, float norm_eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scalekern_native, CPU, m) { m.impl("mamba_update_cpu", TORCH_BOX(&mamba_update)); }
