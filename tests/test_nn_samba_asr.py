"""nn.SambaASREncoder and SambaASRDecoder against their equations in plain torch, sharing no code with the package."""

import math

import pytest
import torch
from nn_modules import (
    attend, bound, by_heads, check_against, check_each_matters, error, from_heads, layer_norm, linear, mamba, normal,
    perturbed, tensors,
)  # fmt: skip

from scalekern.nn import SambaASRDecoder, SambaASREncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
WIDTH, BANDS, VOCABULARY, HEADS = 4, 3, 7, 2
OPTIONS = {"d_state": 3, "dt_rank": 2}
TOKENS = torch.tensor([[1, 5, 0, 3, 6], [2, 2, 4, 1, 0]])


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def convolution(p, name, x, stride):
    """Three taps around each frame, zeros outside: (B, channels, T)."""
    taps, edge = p[f"{name}.weight"], x.new_zeros(*x.shape[:2], 1)
    x = torch.cat([edge, x, edge], -1)
    frames = [torch.einsum("bct,oct->bo", x[..., t : t + 3], taps) for t in range(0, x.shape[-1] - 2, stride)]
    return torch.stack(frames, -1) + p[f"{name}.bias"][:, None]


def layer(p, i):
    return {n.removeprefix(f"layers.{i}."): t for n, t in p.items() if n.startswith(f"layers.{i}.")}


def norm(p, i, x):
    return layer_norm(x, p[f"norms.{i}.weight"], p[f"norms.{i}.bias"])


def encoded(p, mel):
    x = gelu(convolution(p, "conv2", gelu(convolution(p, "conv1", mel, 1)), 2)).transpose(1, 2)
    for i in range(2):
        x = x + mamba(layer(p, i), norm(p, i, x))
    return norm(p, 2, x)


def decoded(p, tokens, audio, lengths=(99, 99)):
    x = p["embedding.weight"][tokens]
    for i in range(2):
        x = x + mamba(layer(p, i), norm(p, 2 * i, x))
        q, (k, v) = linear(p, f"cross.{i}.q", norm(p, 2 * i + 1, x)), linear(p, f"cross.{i}.kv", audio).chunk(2, -1)
        y = attend(*(by_heads(t, HEADS) for t in (q, k, v)), lambda b, h, i, j: j < lengths[b])
        x = x + linear(p, f"cross.{i}.out", from_heads(y))
    return norm(p, 4, x) @ p["embedding.weight"].T


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return perturbed(SambaASREncoder(BANDS, WIDTH, 2, OPTIONS), scale=0.6)


@pytest.fixture
def decoder():
    torch.manual_seed(1)
    return perturbed(SambaASRDecoder(VOCABULARY, WIDTH, 2, HEADS, OPTIONS), scale=0.6)


def test_encoder_matches_the_equations(encoder):
    check_against(encoded, encoder, normal(2, BANDS, 9))
    check_each_matters(encoded, encoder, normal(2, BANDS, 9), ["conv1.bias", "conv2.weight", "norms.2.weight"])
    for frames in (1, 2):  # one frame after subsampling
        assert error(encoder(normal(1, BANDS, frames)), encoded(tensors(encoder), normal(1, BANDS, frames))) < 1e-12


def test_decoder_matches_the_equations(decoder):
    lengths = torch.tensor([6, 3])
    rendering = lambda p, audio: decoded(p, TOKENS, audio, lengths)  # noqa: E731
    check_against(rendering, bound(decoder, lambda forward, x: forward(TOKENS, x, lengths)), normal(2, 6, WIDTH))
    names = [n for n in tensors(decoder) if "cross" in n and n[-6:] == "weight"] + ["embedding.weight", "norms.1.bias"]
    check_each_matters(rendering, decoder, normal(2, 6, WIDTH), names)


def test_rows_of_other_lengths_are_what_they_are_alone(encoder, decoder):
    """What lies in the padding, even nothing finite, is not read."""
    mel, lengths = normal(2, BANDS, 9), torch.tensor([9, 5])
    audio = encoder(mel, lengths)
    alone = encoder(mel[1:, :, :5])
    assert error(audio[1:, :3], alone) < 1e-12 and error(encoder(mel)[1:, :3], alone) > 1e-3
    short = decoder(TOKENS[1:], alone)
    assert error(decoder(TOKENS, audio, torch.tensor([5, 3]))[1:], short) < 1e-12


@torch.no_grad()
def test_token_by_token_is_the_whole(decoder):
    """Steps, a prefill and steps, and the float bound."""
    audio, lengths = normal(2, 6, WIDTH), torch.tensor([6, 3])
    for dtype, bound_ in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        module, x = decoder.to(dtype), audio.to(dtype)
        whole = module(TOKENS, x, lengths)
        for cuts in ([1, 2, 3, 4, 5], [3, 5]):
            cache, outs = module.new_cache(x, lengths), []
            for begin, end in zip([0, *cuts], cuts):
                outs.append(module(TOKENS[:, begin:end], cache=cache))
            assert error(torch.cat(outs, 1), whole) < bound_


def test_pieces_carry_gradients(decoder):
    audio = normal(2, 6, WIDTH).requires_grad_()
    cache = decoder.new_cache(audio)
    joined = torch.cat([decoder(TOKENS[:, b:e], cache=cache) for b, e in ((0, 3), (3, 4), (4, 5))], 1)
    inputs = [audio, *decoder.parameters()]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (joined, decoder(TOKENS, audio))]
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10


@torch.no_grad()
def test_greedy_decoding_is_whole_passes(encoder, decoder):
    audio = encoder(normal(2, BANDS, 9))
    decoder.norms[-1].bias.zero_(), decoder.embedding.weight.copy_(normal(7, WIDTH, seed=5))  # several tokens come
    for mixer in decoder.layers:
        mixer.out_proj.weight.mul_(8)
    sequence = torch.full((2, 1), 1)
    for _ in range(8):
        sequence = torch.cat([sequence, decoder(sequence, audio)[:, -1:].argmax(-1)], 1)
    free = decoder.generate(audio, 1, -1, 8)
    assert torch.equal(free, sequence[:, 1:]) and len(set(free.flatten().tolist())) > 2
    end = int(free[0, 3])
    assert (free == end).any(1).all() and not torch.equal(*free)  # both rows end, each at its own token
    found = decoder.generate(audio, 1, end, 8)
    for row, whole in zip(found.tolist(), free.tolist()):
        length = (whole + [end]).index(end)
        assert row == (whole[:length] + [end] * 8)[: len(row)]
    assert found.shape[1] == min(8, max((r + [end]).index(end) for r in free.tolist()) + 1)
    assert decoder.generate(audio, 1, end, 0).shape == (2, 0)


def test_wrong_use(encoder, decoder):
    with pytest.raises(ValueError, match=r"nn.SambaASREncoder: mel must have shape \(\*, 3, \*\), got \(1, 4, 5\)"):
        encoder(normal(1, 4, 5))
    with pytest.raises(ValueError, match=r"nn.SambaASREncoder: lengths must have shape \(2,\), got \(3,\)"):
        encoder(normal(2, 3, 5), torch.ones(3))
    with pytest.raises(TypeError, match="nn.SambaASREncoder: lengths must be a torch.Tensor, got list"):
        encoder(normal(2, 3, 5), [5, 4])
    with pytest.raises(TypeError, match="nn.SambaASRDecoder: tokens must have dtype int32, int64, got float64"):
        decoder(TOKENS.double(), normal(2, 6, 4))
    with pytest.raises(ValueError, match="either audio or a cache"):
        decoder(TOKENS)
    with pytest.raises(ValueError, match=r"nn.SambaASRDecoder: audio must have shape \(\*, \*, 4\)"):
        decoder(TOKENS, normal(2, 6, 5))
