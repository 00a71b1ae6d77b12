"""UniRepLKNet's block: a large depthwise filter, trained as a sum of dilated ones, then squeeze-excitation and an FFN.

Shape letters: B batch, C channels (dim), H x W image, K filter size, I width of the FFN, k and r a branch's filter and
dilation.

Parameter names and shapes are those of AILab-CVC/UniRepLKNet's unireplknet.py, so its checkpoints load, both forms:

    dwconv.lk_origin.weight            (C, 1, K, K); deployed, with a .bias (C,)
    dwconv.origin_bn                   BatchNorm2d; not deployed
    dwconv.dil_conv_k{k}_{r}.weight    (C, 1, k, k), and .dil_bn_k{k}_{r}; not deployed
    dwconv.weight                      in place of these for K of 3 and 5; deployed, with a .bias; none for K = 0
    norm                               BatchNorm2d; not deployed
    se.down, se.up                     Conv2d 1 x 1: C to C / 4, and back
    pwconv1.1                          Linear: C to I
    act.1.gamma, .beta                 (1, 1, 1, I); deployed, no beta
    pwconv2.0, .2                      Linear: I to C without a bias, BatchNorm2d; deployed, Linear with a bias
    gamma                              (C,), the layer scale; not deployed

Source: Ding et al., UniRepLKNet: A Universal Perception Large-Kernel ConvNet, 2024, section 3.1; the normalization of
responses: Woo et al., ConvNeXt V2, 2023, section 3; squeeze-excitation: Hu et al., 2018, section 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.ops.depthwise_conv2d import depthwise_conv2d, merge_dilated_branches

NAME = "nn.UniRepLKNetBlock"
# K: the (k, r) of the branches beside the large filter.
BRANCHES = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
PLAIN = (3, 5)  # sizes that the block takes as one filter, without branches


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d's parameters, a filter a channel, padding "same", run by depthwise_conv2d."""

    def __init__(self, channels, kernel_size, dilation=1, bias=False, device=None, dtype=None):
        super().__init__(
            channels, channels, kernel_size, padding=dilation * (kernel_size - 1) // 2, dilation=dilation,
            groups=channels, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x):
        return depthwise_conv2d(x, self.weight, self.bias, dilation=self.dilation)


class SEBlock(nn.Module):
    """x times the sigmoid of a two-layer network of its means."""

    def __init__(self, input_channels, internal_neurons, device=None, dtype=None):
        super().__init__()
        self.down = nn.Conv2d(input_channels, internal_neurons, 1, device=device, dtype=dtype)
        self.up = nn.Conv2d(internal_neurons, input_channels, 1, device=device, dtype=dtype)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class GRNwithNHWC(nn.Module):
    """(gamma N + 1) x + beta for x (B, H, W, I): N is a channel's L2 norm over the image, over the channels' mean."""

    def __init__(self, dim, use_bias=True, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.register_parameter("beta", nn.Parameter(torch.zeros_like(self.gamma)) if use_bias else None)

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        out = (self.gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + 1) * x
        return out if self.beta is None else out + self.beta


class DropPath(nn.Module):
    """In training, zero a sample with probability p, and scale the others to keep the mean."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


class Permute(nn.Module):
    """A change of layout that holds its place in a Sequential, whose numbers are checkpoint keys."""

    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class DilatedReparamBlock(nn.Module):
    """(B, C, H, W) to the same: the sum of a large depthwise filter and dilated small ones, each batch-normalized.

    Args:
        channels: C.   kernel_size: K, odd, 5 to 17.   deploy: one filter with a bias, the merged form.

    Raises:
        ValueError: another K.
    """

    def __init__(self, channels, kernel_size, deploy=False, device=None, dtype=None):
        super().__init__()
        _checks.choice("nn.DilatedReparamBlock", "kernel_size", kernel_size, tuple(BRANCHES))
        factory = {"device": device, "dtype": dtype}
        self.lk_origin = DepthwiseConv2d(channels, kernel_size, bias=deploy, **factory)
        self.branches = () if deploy else BRANCHES[kernel_size]
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(channels, **factory)
        for k, r in self.branches:
            self.add_module(f"dil_conv_k{k}_{r}", DepthwiseConv2d(channels, k, r, **factory))
            self.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels, **factory))

    def _parts(self):
        """(convolution, batch norm, dilation) of every branch, the large filter first."""
        yield self.lk_origin, self.origin_bn, 1
        for k, r in self.branches:
            yield getattr(self, f"dil_conv_k{k}_{r}"), getattr(self, f"dil_bn_k{k}_{r}"), r

    def forward(self, x):
        if not self.branches:
            return self.lk_origin(x)
        if not self.training:  # the norms are constants: one convolution, not six
            return depthwise_conv2d(x, *self._merged())
        first, *others = (bn(conv(x)) for conv, bn, _ in self._parts())
        return sum(others, first)

    def _merged(self):
        """The filter and the bias that do all of it."""
        parts = list(self._parts())
        weights, biases = zip(*(fuse(conv.weight, conv.bias, bn) for conv, bn, _ in parts))
        merged = merge_dilated_branches(weights, [r for _, _, r in parts], self.lk_origin.kernel_size)
        return merged, torch.stack(biases).sum(0)

    @torch.no_grad()
    def merge_dilated_branches(self):
        """Become the merged form, in place; what eval mode computes stays the same."""
        if self.branches:
            self.lk_origin.weight, self.lk_origin.bias = (nn.Parameter(t) for t in self._merged())
            for k, r in self.branches:
                delattr(self, f"dil_conv_k{k}_{r}")
                delattr(self, f"dil_bn_k{k}_{r}")
            del self.origin_bn
            self.branches = ()


def fuse(weight, bias, bn):
    """(weight, bias) of a layer, output features first, with a batch norm in eval mode after it."""
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift if bias is None else shift + bias * scale


class UniRepLKNetBlock(nn.Module):
    """(B, C, H, W) to the same: x + gamma FFN(SE(BN(large filter * x))).

    Args:
        dim: C, from 4.   kernel_size: K: 7 to 17, odd, with dilated branches; 3 or 5 without; 0 for no convolution.
        drop_path: probability that training drops a sample's branch.
        layer_scale_init_value: initial gamma; None or 0 for none.
        deploy: the form that `reparameterize` leaves, for its checkpoints.   ffn_factor: I / C.

    Raises:
        ValueError: another kernel_size; a dim below 4.
    """

    def __init__(
        self, dim, kernel_size, drop_path=0.0, layer_scale_init_value=1e-6, deploy=False, ffn_factor=4, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.choice(NAME, "kernel_size", kernel_size, (0, *PLAIN, *(k for k in BRANCHES if k not in PLAIN)))
        _checks.at_least(NAME, "dim", dim, 4)
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        if kernel_size == 0:
            self.dwconv = nn.Identity()
        elif kernel_size in PLAIN:
            self.dwconv = DepthwiseConv2d(dim, kernel_size, bias=deploy, **factory)
        else:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy, **factory)
        self.norm = nn.Identity() if deploy or kernel_size == 0 else nn.BatchNorm2d(dim, **factory)
        self.se = SEBlock(dim, dim // 4, **factory)
        inner = int(ffn_factor * dim)
        self.pwconv1 = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(dim, inner, **factory))
        self.act = nn.Sequential(nn.GELU(), GRNwithNHWC(inner, use_bias=not deploy, **factory))
        norm = () if deploy else (nn.BatchNorm2d(dim, **factory),)
        self.pwconv2 = nn.Sequential(nn.Linear(inner, dim, bias=deploy, **factory), Permute(0, 3, 1, 2), *norm)
        scaled = not deploy and layer_scale_init_value
        gamma = torch.full((dim,), float(layer_scale_init_value), **factory) if scaled else None
        self.register_parameter("gamma", None if gamma is None else nn.Parameter(gamma))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        _checks.tensor(NAME, "x", x, dims=4, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "x", x, (None, self.dim, None, None))
        y = self.pwconv2(self.act(self.pwconv1(self.se(self.norm(self.dwconv(x))))))
        return x + self.drop_path(y if self.gamma is None else self.gamma.view(-1, 1, 1) * y)

    @torch.no_grad()
    def reparameterize(self):
        """Fold every norm, scale and branch into the weights, in place: the same function of x as in eval mode."""
        conv = self.dwconv
        if isinstance(conv, DilatedReparamBlock):
            conv.merge_dilated_branches()
            conv = conv.lk_origin
        if isinstance(self.norm, nn.BatchNorm2d):
            conv.weight, conv.bias = (nn.Parameter(t) for t in fuse(conv.weight, conv.bias, self.norm))
            self.norm = nn.Identity()
        linear, grn = self.pwconv2[0], self.act[1]
        weight, bias = linear.weight, linear.bias
        if grn.beta is not None:  # what it adds goes through the linear layer
            bias = (0 if bias is None else bias) + weight @ grn.beta.flatten()
            grn.beta = None
        if len(self.pwconv2) == 3:
            weight, bias = fuse(weight, bias, self.pwconv2[2])
            self.pwconv2 = self.pwconv2[:2]
        if self.gamma is not None:
            weight, bias = weight * self.gamma[:, None], bias * self.gamma
            self.gamma = None
        linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
