"""Oracle of the short causal depthwise convolution and its one-token form.

Shape letters: B batch, D channels, L length, W filter width (2 to 8), S packed sequences.

    out[t] = act(bias + sum_w weight[w] x[t - (W - 1) + w])       x before the sequence: initial state, or zero
"""

import torch
import torch.nn.functional as F


def causal_conv1d(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None,
    *, cu_seqlens=None,
):  # fmt: skip
    """Same arguments and results as scalekern.causal_conv1d."""
    out, final = causal_conv1d_fwd(
        x, weight, bias, seq_idx, cu_seqlens, initial_states, activation in ("silu", "swish")
    )
    final = final if seq_idx is None else without_padding(final, seq_idx)
    return (out, final) if return_final_states else out


def without_padding(final, seq_idx):
    """Final states; zeros of a row that ends with padding, whatever lies in it."""
    return final.masked_fill((seq_idx[:, -1:] < 0).any(1)[:, None, None], 0)


def causal_conv1d_fwd(x, weight, bias, seq_idx, cu_seqlens, initial_states, silu):
    """(out, final_states): every run of equal seq_idx, or packed sequence, is convolved by itself."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = weight.shape[1]
    w, b = weight.to(real), None if bias is None else bias.to(real)
    out = []
    finals = []
    for row, begin, end, initial, padding in _runs(x, seq_idx, cu_seqlens, initial_states, width):
        part = torch.cat([initial.to(real), x[row, :, begin:end].to(real)], -1)
        y = sum(w[:, i, None] * part[:, i : i + end - begin] for i in range(width))
        y = y if b is None else y + b[:, None]
        y = F.silu(y) if silu else y
        out.append((row, torch.zeros_like(y) if padding else y))
        finals.append((row, part[:, part.shape[1] - (width - 1) :]))
    rows = [torch.cat([y for r, y in out if r == row] or [x[row].to(real)], -1) for row in range(x.shape[0])]
    result = torch.stack(rows) if rows else x.to(real)
    if cu_seqlens is not None:
        states = [final for _, final in finals]
    else:  # the state of a row is that of its last run
        last = dict(finals)
        states = [
            last.get(row, _zeros(x, width, real) if initial_states is None else initial_states[row].to(real))
            for row in range(x.shape[0])
        ]
    final = torch.stack(states) if states else x.new_zeros(0, x.shape[1], width - 1, dtype=real)
    return result.to(x.dtype), final.to(x.dtype)


def causal_conv1d_bwd(dout, dfinal_states, x, weight, bias, seq_idx, cu_seqlens, initial_states, silu):
    """(dx, dweight, dbias, dinitial_states); an absent input's gradient is empty (0,).

    dpre = dout act'(pre); dx[t] = sum_w weight[w] dpre[t + (W - 1) - w]; dweight[w] = sum_t dpre[t] x[t - (W - 1) + w]
    """
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = weight.shape[1]
    w = weight.to(real)
    dx = torch.zeros(x.shape, dtype=real, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=real, device=x.device)
    dbias = torch.zeros(weight.shape[0], dtype=real, device=x.device)
    dinitial = None if initial_states is None else torch.zeros(initial_states.shape, dtype=real, device=x.device)
    runs = list(_runs(x, seq_idx, cu_seqlens, initial_states, width))
    last_of_row = {row: i for i, (row, *_) in enumerate(runs)}
    first_of_row = {row: i for i, (row, *_) in reversed(list(enumerate(runs)))}
    for i, (row, begin, end, initial, padding) in enumerate(runs):
        part = torch.cat([initial.to(real), x[row, :, begin:end].to(real)], -1)
        dpre = dout[row, :, begin:end].to(real)
        if silu:
            pre = sum(w[:, k, None] * part[:, k : k + end - begin] for k in range(width))
            pre = pre if bias is None else pre + bias.to(real)[:, None]
            gate = pre.sigmoid()
            dpre = dpre * gate * (1 + pre * (1 - gate))
        dpre = torch.zeros_like(dpre) if padding else dpre
        dpart = torch.zeros_like(part)
        for k in range(width):
            dpart[:, k : k + end - begin] += w[:, k, None] * dpre
            if not padding:  # whose inputs may be NaN
                dweight[:, k] += (dpre * part[:, k : k + end - begin]).sum(-1)
        dbias += dpre.sum(-1)
        if dfinal_states is not None and (cu_seqlens is not None or last_of_row[row] == i):
            dpart[:, part.shape[1] - (width - 1) :] += dfinal_states[i if cu_seqlens is not None else row].to(real)
        dx[row, :, begin:end] = dpart[:, width - 1 :]
        if dinitial is not None and cu_seqlens is not None:
            dinitial[i] = dpart[:, : width - 1]
        elif dinitial is not None and first_of_row[row] == i:
            dinitial[row] = dpart[:, : width - 1]
    if dinitial is not None and dfinal_states is not None and cu_seqlens is None and x.shape[2] == 0:
        dinitial += dfinal_states.to(real)
    return (
        dx.to(x.dtype), dweight.to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.to(bias.dtype),
        x.new_empty(0) if dinitial is None else dinitial.to(initial_states.dtype),
    )  # fmt: skip


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):  # fmt: skip
    """Same arguments as scalekern.causal_conv1d_update; changes `conv_state` in place and returns the output."""
    steps = x[..., None] if x.dim() == 2 else x
    out = causal_conv1d_update_op(
        conv_state, steps, weight, bias, cache_seqlens, conv_state_indices, activation in ("silu", "swish")
    )
    return out.reshape(x.shape)


def causal_conv1d_update_op(conv_state, x, weight, bias, cache_seqlens, conv_state_indices, silu):
    """The op's form: x (B, D, T). The state is a window of the last tokens, or circular with cache_seqlens."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, steps = x.shape
    width, size = weight.shape[1], conv_state.shape[-1]
    w, b = weight.to(real), None if bias is None else bias.to(real)
    out = torch.zeros(x.shape, dtype=real, device=x.device)
    for i in range(batch):
        slot = i if conv_state_indices is None else int(conv_state_indices[i])
        if slot < 0:
            continue  # padding: the output is zero, no state changes
        history = torch.arange(size, device=x.device)
        if cache_seqlens is not None:  # token p lies at p % size; the oldest one is the next to be overwritten
            history = (history + int(cache_seqlens[i])) % size
        window = torch.cat([conv_state[slot][:, history].to(real), x[i].to(real)], -1)
        tail = window[:, window.shape[1] - (width - 1 + steps) :]
        y = sum(w[:, k, None] * tail[:, k : k + steps] for k in range(width))
        y = y if b is None else y + b[:, None]
        out[i] = F.silu(y) if silu else y
        kept = window[:, window.shape[1] - size :].to(conv_state.dtype)
        if cache_seqlens is None:
            conv_state[slot] = kept
        else:
            conv_state[slot, :, (history + steps) % size] = kept
    return out.to(x.dtype)


def _zeros(x, width, real):
    return torch.zeros(x.shape[1], width - 1, dtype=real, device=x.device)


def _runs(x, seq_idx, cu_seqlens, initial_states, width):
    """(row, begin, end, history (D, W - 1), is padding) of every stretch that is convolved by itself.

    An initial state belongs to its packed sequence, or to the first run of its row. Negative seq_idx is padding.
    """
    zeros = _zeros(x, width, x.dtype)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        for s, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            yield 0, begin, end, zeros if initial_states is None else initial_states[s], False
        return
    for row in range(x.shape[0]):
        ids = [0] * x.shape[2] if seq_idx is None else seq_idx[row].tolist()
        cuts = [t for t in range(1, len(ids)) if ids[t] != ids[t - 1]]
        for begin, end in zip([0, *cuts], [*cuts, len(ids)]):
            if begin == end:
                continue
            initial = zeros if initial_states is None or begin else initial_states[row]
            yield row, begin, end, initial, ids[begin] < 0
