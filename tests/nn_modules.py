"""What the tests of scalekern.nn share: modules off their initial values, and comparisons with a rendering."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def perturbed(module, seed=0, scale=0.3):
    """The module in float64 with every parameter moved, each by its own amount."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            amount = scale * (0.3 + 0.7 * torch.rand((), generator=generator, dtype=torch.float64))
            p += amount * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(got, expected):
    """Relative L2 error; an all-zero `got` has error 1."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def tensors(module):
    """Parameters and buffers by every name that the state dict has for them."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def check_against(rendering, module, x, forward_error=1e-12, gradient_error=1e-10):
    """module(x) and rendering(tensors, x) agree, and so do their gradients for x and every parameter.

    A gradient that is zero but for rounding (of a constant before a batch norm in training) is zero in both.
    """
    x = x.requires_grad_()
    named = dict(module.named_parameters())
    outs = module(x), rendering(tensors(module), x)
    assert error(*outs) < forward_error
    weight = normal(*outs[0].shape, seed=2)
    grads = (torch.autograd.grad((out * weight).sum(), [x, *named.values()]) for out in outs)
    for name, got, expected in zip(["x", *named], *grads, strict=True):
        assert error(got, expected) < gradient_error or max(got.norm(), expected.norm()) < gradient_error, name


def check_each_matters(rendering, module, x, names):
    """The comparison notices a rendering that has dropped one of these."""
    out = module(x)
    for name in names:
        changed = {n: torch.zeros_like(t) if n == name else t for n, t in tensors(module).items()}
        assert error(out, rendering(changed, x)) > 1e-4, name


def check_loads(module, shapes):
    """A checkpoint with these names and shapes, upstream's, loads; its values arrive under its names."""
    own = module.state_dict()
    state = {name: (9 * torch.rand(shape)).to(own[name].dtype) for name, shape in shapes.items() if name in own}
    assert {name: tuple(t.shape) for name, t in own.items()} == shapes
    module.load_state_dict(state, strict=True)
    shared = {name for name, t in own.items() if sum(t.data_ptr() == o.data_ptr() for o in own.values()) > 1}
    for name, t in module.state_dict().items():
        assert name in shared or torch.equal(t, state[name]), name


def check_compiled(module, x, backend):
    """torch.compile(fullgraph=True) gives the same output and the same gradient."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    outs = [f(x.requires_grad_()) for f in (compiled, module)]
    assert error(*outs) < 1e-12
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in outs]
    for got, expected in zip(*grads, strict=True):
        assert error(got, expected) < 1e-10 or max(got.norm(), expected.norm()) < 1e-10


def check_padding(rendering, module, left, mask_of=lambda mask: mask):
    """Rows of 9, 4 and 1 tokens, padded left or right, give what each gives alone, and padding no gradient."""
    rows = [normal(1, length, 4, seed=length) for length in (9, 4, 1)]
    pad = lambda row: F.pad(row, (0, 0, 9 - row.shape[1], 0) if left else (0, 0, 0, 9 - row.shape[1]), value=3.0)
    u = torch.cat([pad(row) for row in rows]).requires_grad_()
    mask = torch.cat([pad(torch.ones_like(row[..., :1]))[..., 0] == 1 for row in rows])
    out = module(u, mask=mask_of(mask))
    for got, keep, row in zip(out, mask, rows):
        assert error(got[keep], rendering(tensors(module), row)[0]) < 1e-12
    (grad,) = torch.autograd.grad((out * mask[..., None]).sum(), u)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any(-1).all()


def bound(module, call):
    """The module as a function of one tensor: module(x) is call(forward, x)."""
    forward = module.forward
    module.forward = lambda x: call(forward, x)
    return module


def attend(q, k, v, allowed, scale=None):
    """softmax(scale q k^T) v, head by head, over the keys j with allowed(b, h, i, j); zero where there is none.

    q (B, H, L, P); k, v (B, G, M, P), of which head h reads head h // (H / G).
    """
    B, H, L, P = q.shape
    outs = []
    for b in range(B):
        for h in range(H):
            g = h * k.shape[1] // H
            seen = torch.tensor([[bool(allowed(b, h, i, j)) for j in range(k.shape[2])] for i in range(L)])
            weights = (q[b, h] @ k[b, g].T * (P**-0.5 if scale is None else scale)).exp() * seen
            outs.append(weights @ v[b, g] / (weights.sum(-1, keepdim=True) + ~seen.any(-1, keepdim=True)))
    return torch.stack(outs).view(B, H, L, -1)


def layer_norm(x, weight=1.0, bias=0.0, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def linear(p, name, x):
    """The affine map of that name; its bias if there is one."""
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def by_heads(x, heads):
    """(B, L, H P) to (B, H, L, P), head by head."""
    return torch.stack(x.chunk(heads, -1), 1)


def from_heads(x):
    return torch.cat(list(x.unbind(1)), -1)


def mamba(p, x):
    """Gu & Dao 2023, figure 3 and algorithm 2, rows x (B, L, width)."""
    u, z = linear(p, "in_proj", x).chunk(2, -1)
    taps, A = p["conv1d.weight"][:, 0], -p["A_log"].exp()
    h, ys, rank, states = torch.zeros_like(A), [], p["dt_proj.weight"].shape[1], A.shape[1]
    for t in range(x.shape[1]):
        v = sum(taps[:, 3 - t + s] * u[:, s] for s in range(max(0, t - 3), t + 1)) + p["conv1d.bias"]
        v = v * sigmoid(v)
        r, B, C = linear(p, "x_proj", v).split([rank, states, states], -1)
        step = torch.log1p(torch.exp(linear(p, "dt_proj", r)))[..., None]
        h = torch.exp(step * A) * h + step * B[:, None] * v[..., None]
        ys.append((h * C[:, None]).sum(-1) + p["D"] * v)
    return linear(p, "out_proj", torch.stack(ys, 1) * z * sigmoid(z))


def mamba2(p, x):
    """Dao & Gu 2024, section 7, one group, rows x (B, L, width) token by token."""
    D, H = p["out_proj.weight"].shape[1], len(p["A_log"])
    channels, P = len(p["conv1d.weight"]), D // H
    N = (channels - D) // 2
    z, xBC, dt = linear(p, "in_proj", x).split([D, channels, H], -1)
    taps, h, ys = p["conv1d.weight"][:, 0], x.new_zeros(x.shape[0], H, P, N), []
    for t in range(x.shape[1]):
        seen = range(max(0, t - taps.shape[1] + 1), t + 1)
        u = sum(taps[:, taps.shape[1] - 1 - t + s] * xBC[:, s] for s in seen) + p["conv1d.bias"]
        main, B, C = (u * sigmoid(u)).split([D, N, N], -1)
        main, step = main.unflatten(-1, (H, P)), torch.log1p(torch.exp(dt[:, t] + p["dt_bias"]))[..., None]
        h = torch.exp(-step * p["A_log"].exp()[:, None])[..., None] * h + (step * main)[..., None] * B[:, None, None]
        ys.append(((h * C[:, None, None]).sum(-1) + p["D"][:, None] * main).flatten(1))
    y = torch.stack(ys, 1) * z * sigmoid(z)
    return linear(p, "out_proj", p["norm.weight"] * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made in it."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outs = function(*args, **(kwargs or {}))
        made = [t for t in (outs if isinstance(outs, (tuple, list)) else [outs]) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in made)])
        return outs


def memory(call, x):
    """Bytes that forward keeps for backward, and of the largest tensor of either."""
    x, kept = x.detach().clone().requires_grad_(), {}
    keep = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = call(x)
        out.sum().backward()
    return sum(kept.values()), largest.bytes
