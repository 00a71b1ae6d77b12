"""Relative tables as the models that have them write them: T5's buckets, windows of Swin, Swin V2 and CrossFormer."""

import pytest
import torch
import torch.nn.functional as F
from conftest import kernel_places
from contract import captured_calls

import scalekern
from scalekern import masks, reference
from scalekern.testing import assert_close

every_kernel = pytest.mark.parametrize("place", kernel_places())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(found, wanted, leaves, mine):
    """Outputs, and the gradients of a random projection, through each party's own leaves."""
    weight = randn(*wanted.shape, seed=9)
    assert_close(found, wanted, tolerance=1e-12)
    grads = [torch.autograd.grad((y * weight.to(y.device)).sum(), x) for y, x in ((wanted, leaves), (found, mine))]
    for e, a in zip(*grads):
        assert e.norm() > 0
        assert_close(a.to(e.device), e, tolerance=1e-11)


def turned(table, h, w):
    """Swin's ((2 h - 1) (2 w - 1), H), by query - key, as (H, 2 h - 1, 2 w - 1), by key - query."""
    return table.view(2 * h - 1, 2 * w - 1, -1).flip(0, 1).permute(2, 0, 1)


# ---- T5 ----


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 20), (8, 5), (64, 1000), (6, 128)])
def test_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    T5Attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = torch.arange(-2000, 2001)
    wanted = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    found = scalekern.relative_position_buckets(num_buckets, max_distance, bidirectional=bidirectional)
    assert found.dtype == torch.int64 and found.shape == (2 * max_distance + 1,)
    assert torch.equal(found[distance.clamp(-max_distance, max_distance) + max_distance], wanted)


@every_kernel
@pytest.mark.parametrize("bidirectional", [True, False])
def test_attention_of_t5(bidirectional, place):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    H, P, L = 3, 4, 70
    config = t5.T5Config(
        d_model=H * P, d_kv=P, num_heads=H, is_decoder=not bidirectional, relative_attention_max_distance=30
    )
    layer = t5.T5Attention(config, has_relative_attention_bias=True).double()
    torch.nn.init.normal_(layer.relative_attention_bias.weight)
    mask = masks.everything if bidirectional else masks.causal
    leaves = [*(randn(2, H, L, P, seed=i).requires_grad_() for i in range(3)), layer.relative_attention_bias.weight]
    scores = leaves[0] @ leaves[1].mT + layer.compute_bias(L, L)
    wanted = torch.softmax(scores.masked_fill(~mask.to_dense(L, L), float("-inf")), -1) @ leaves[2]
    q, k, v, weight = mine = [x.detach().to(place[0]).clone().requires_grad_() for x in leaves]
    buckets = scalekern.relative_position_buckets(32, 30, bidirectional=bidirectional)
    with scalekern.backend(place[1]):
        found = scalekern.sparse_attention(q, k, v, mask, scale=1.0, position_table=weight[buckets].T)
        agree(found, wanted, leaves, mine)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 128), "num_buckets must be an even integer of at least 4, got 0"),
        ((7, 128), "num_buckets must be an even integer of at least 4, got 7"),
        ((32, 8), "max_distance must be an integer above 8, got 8"),
        ((32, 1.5), "max_distance must be an integer above 8, got 1.5"),
    ],
)
def test_bad_buckets_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"relative_position_buckets: {message}"):
        scalekern.relative_position_buckets(*arguments)


# ---- Swin ----


@every_kernel
@pytest.mark.parametrize("h, w", [(7, 7), (3, 5), (1, 6), (8, 9)])
def test_window_of_swin(h, w, place):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    H, P = 2, 4
    bias = swin.SwinRelativePositionBias(H, (h, w)).double()
    torch.nn.init.normal_(bias.relative_position_bias_table)
    leaves = [*(randn(2, H, h * w, P, seed=i).requires_grad_() for i in range(3)), bias.relative_position_bias_table]
    wanted = torch.softmax(leaves[0] @ leaves[1].mT * P**-0.5 + bias(), -1) @ leaves[2]
    q, k, v, table = mine = [x.detach().to(place[0]).clone().requires_grad_() for x in leaves]
    with scalekern.backend(place[1]):
        agree(scalekern.sparse_attention(q, k, v, position_table=turned(table, h, w)), wanted, leaves, mine)


@every_kernel
def test_layer_of_swin_v2(place):
    """Cosine scores with a learned temperature, and a table that a network makes of log-spaced distances."""
    swin = pytest.importorskip("transformers.models.swinv2.modeling_swinv2")
    M, H, P = 4, 2, 6
    layer = swin.Swinv2SelfAttention(swin.Swinv2Config(), H * P, H, M).double()
    layer.relative_coords_table = layer.relative_coords_table.double()
    x = randn(3, M * M, H * P).requires_grad_()
    leaves = [x, *layer.parameters()]
    (wanted,) = layer(x)
    layer, mine = layer.to(place[0]), leaves
    with scalekern.backend(place[1]):
        q, k, v = (f(x).unflatten(2, (H, P)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
        table = 16 * torch.sigmoid(layer.continuous_position_bias_mlp(layer.relative_coords_table).flatten(0, 2))
        out = scalekern.sparse_attention(
            q, k, v, score="cosine", temperature=layer.logit_scale.flatten(), position_table=turned(table, M, M)
        )
        agree(out.transpose(1, 2).flatten(2), wanted, leaves, mine)


@every_kernel
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("h, w", [(7, 7), (3, 5), (9, 8)])
def test_group_of_crossformer(h, w, residual, place):
    """Its dynamic position bias: a network of the offset of each pair; ours runs it once for each entry of the table.

    The network's last bias, which a softmax does not see, has a gradient of rounding errors only.
    """
    H, P, width = 2, 4, 8
    torch.manual_seed(0)
    network = dynamic_position_bias(width, H).to(torch.float64)
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
    pairs = bias_of(network, at[:, None] - at, residual).permute(2, 0, 1)  # [H, query, key], of query - key
    leaves = [*(randn(3, H, h * w, P, seed=i).requires_grad_() for i in range(3)), *[*network.parameters()][:-1]]
    wanted = torch.softmax(leaves[0] @ leaves[1].mT * P**-0.5 + pairs, -1) @ leaves[2]
    ours = dynamic_position_bias(width, H).to(place[0], torch.float64)
    ours.load_state_dict(network.state_dict())
    mine = [*(x.detach().to(place[0]).requires_grad_() for x in leaves[:3]), *[*ours.parameters()][:-1]]
    offsets = torch.cartesian_prod(torch.arange(1 - h, h), torch.arange(1 - w, w)).to(mine[0])
    with scalekern.backend(place[1]):
        table = bias_of(ours, offsets, residual)
        agree(scalekern.sparse_attention(*mine[:3], position_table=turned(table, h, w)), wanted, leaves, mine)


def dynamic_position_bias(width, heads):
    """Wang et al., CrossFormer, 2021, section 3.2 and figure 4: a projection, then LayerNorm, ReLU, Linear thrice."""
    block = lambda out: torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.ReLU(), torch.nn.Linear(width, out))
    return torch.nn.ModuleList([torch.nn.Linear(2, width), block(width), block(width), block(heads)])


def bias_of(network, offsets, residual):
    """(..., 2) to (..., H). residual: as upstream's option, x + block(x) in the middle."""
    first, *middle, last = network
    x = first(offsets)
    for block in middle:
        x = x + block(x) if residual else block(x)
    return last(x)


@every_kernel
def test_windows_of_a_whole_image(place):
    """Windows that are shifted, without cutting the image up: a window's table, padded to the image's."""
    H, W, M, shift = 6, 8, 4, 2
    q, k, v = (randn(1, 2, H * W, 4, seed=i).requires_grad_() for i in range(3))
    table = randn(2, 2 * M - 1, 2 * M - 1, seed=5).requires_grad_()
    at = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    apart = at - at[:, None]
    visible = masks.window2d((H, W), M, shift).to_dense(H * W, H * W)[0, 0]
    index = torch.where(visible[..., None], apart + M - 1, 0)
    scores = q @ k.mT * 0.5 + table[:, index[..., 0], index[..., 1]]
    wanted = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ v
    mine = [x.detach().to(place[0]).clone().requires_grad_() for x in (q, k, v, table)]
    whole = F.pad(mine[3], (W - M, W - M, H - M, H - M))
    with scalekern.backend(place[1]):
        found = scalekern.sparse_attention(*mine[:3], masks.window2d((H, W), M, shift), position_table=whole)
        agree(found, wanted, [q, k, v, table], mine)


def test_nothing_grows_with_the_square_of_an_image():
    h, w = 20, 24
    args = (*(randn(1, 2, h * w, 4, seed=i) for i in range(3)), masks.neighborhood((h, w), 3))
    calls = captured_calls("sparse_attention", args, {"position_table": randn(2, 2 * h - 1, 2 * w - 1)})
    assert len(calls) == 2  # forward and backward
    for _, values in calls:
        assert max(x.numel() for x in values if isinstance(x, torch.Tensor)) < 10 * h * w


def test_an_images_table_is_refused_for_packed_sequences():
    q, cu = randn(6, 2, 4), torch.tensor([0, 6])
    with pytest.raises(ValueError, match="sparse_attention: position_table must have 1 or 2 dimensions"):
        scalekern.sparse_attention(q, q, q, cu_seqlens=cu, position_table=randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"sparse_attention: q and k must have the \(3, 4\) tokens"):
        x = randn(1, 2, 6, 4)
        scalekern.sparse_attention(x, x, x, position_table=randn(2, 5, 7))


def test_the_oracle_is_the_formula():
    h, w = 3, 4
    table = randn(2, 2 * h - 1, 2 * w - 1)
    bias = reference.sparse_attention.__globals__["image_bias"](table)
    for q, k in ((0, 0), (0, 11), (11, 0), (5, 6), (7, 2)):
        assert torch.equal(bias[0, :, q, k], table[:, h - 1 + k // w - q // w, w - 1 + k % w - q % w])
