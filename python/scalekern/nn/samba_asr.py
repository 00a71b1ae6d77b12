"""Samba-ASR: Mamba over the frames of speech, and Mamba over its text, which looks at the speech.

Shape letters: B batch, T frames of a spectrogram, F its bands (n_mels), L frames after subsampling, ceil(T / 2), N text
tokens, M width (d_model), V vocabulary, H heads, P = M / H.

Two things are this module's own: the bridge from text to speech (the paper's Mamba-cross-connection) is a softmax
cross-attention behind each Mamba layer of the decoder, whose keys and values are made once an utterance; and no
positions are added, for both sides are recurrences. The output weights are the embedding's.

Source: Shakhadri et al., Samba-ASR: State-Of-The-Art Speech Recognition Leveraging Structured State-Space Models, 2025,
section 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks, masks
from scalekern.nn._attention import check_heads, merge, split
from scalekern.nn.mamba import Mamba
from scalekern.ops.sparse_attention import sparse_attention


class SambaASREncoder(nn.Module):
    """Maps a log-Mel spectrogram (B, F, T) to (B, L, M): two convolutions, the second of stride 2, and Mamba layers.

    Args:
        n_mels: F.   d_model: M.   n_layer: Mamba layers, each behind a LayerNorm and beside a residual path.
        mamba: options of nn.Mamba, as d_state.

    Source: Shakhadri et al., Samba-ASR, 2025, section 3.
    """

    NAME = "nn.SambaASREncoder"

    def __init__(self, n_mels=80, d_model=256, n_layer=4, mamba=None, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.n_mels = n_mels
        self.conv1 = nn.Conv1d(n_mels, d_model, 3, padding=1, **factory)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1, **factory)
        self.layers = nn.ModuleList([Mamba(d_model, **(mamba or {}), **factory) for _ in range(n_layer)])
        self.norms = nn.ModuleList([nn.LayerNorm(d_model, **factory) for _ in range(n_layer + 1)])

    def forward(self, mel, lengths=None):
        """Whole utterances.

        Args:
            mel: (B, F, T).
            lengths: (B,) frames of each row, the rest is padding: a row then gives in its first ceil(length / 2)
                frames what it gives alone.

        Returns:
            (B, L, M).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(self.NAME, "mel", mel, dims=3, dtypes=_checks.taken_by(self.conv1))
        _checks.shape(self.NAME, "mel", mel, (None, self.n_mels, None))
        x = F.gelu(self.conv1(_cut(self.NAME, mel, lengths)))
        x = F.gelu(self.conv2(_cut(self.NAME, x, lengths))).transpose(1, 2)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.norms[-1](x)


class SambaASRDecoder(nn.Module):
    """Maps text tokens (B, N) and speech (B, L, M) to logits (B, N, V) of each next token.

    Args:
        vocab_size: V.   d_model: M.   n_layer: layers of a Mamba and a cross-attention, each behind a LayerNorm and
            beside a residual path.   num_heads: H.   mamba: options of nn.Mamba, as d_state.

    Raises:
        ValueError: heads that do not divide M.

    Source: Shakhadri et al., Samba-ASR, 2025, section 3.
    """

    NAME = "nn.SambaASRDecoder"

    def __init__(self, vocab_size, d_model=256, n_layer=4, num_heads=4, mamba=None, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.head_dim = d_model, check_heads(self.NAME, d_model, num_heads)
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList([Mamba(d_model, **(mamba or {}), **factory) for _ in range(n_layer)])
        widths = {"q": d_model, "kv": 2 * d_model, "out": d_model}
        self.cross = nn.ModuleList(
            [nn.ModuleDict({n: nn.Linear(d_model, w, **factory) for n, w in widths.items()}) for _ in range(n_layer)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(d_model, **factory) for _ in range(2 * n_layer + 1)])

    def new_cache(self, audio, lengths=None):
        """What `forward` takes as its cache before the first token: each layer's keys and values of the speech.

        Args:
            audio: (B, L, M), of SambaASREncoder.
            lengths: (B,) frames of each row of `audio`, the rest is padding.
        """
        _checks.tensor(self.NAME, "audio", audio, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(self.NAME, "audio", audio, (None, None, self.d_model))
        heard = [tuple(split(x, self.head_dim) for x in cross["kv"](audio).chunk(2, -1)) for cross in self.cross]
        return Cache(heard, None if lengths is None else masks.prefix(lengths))

    def forward(self, tokens, audio=None, lengths=None, *, cache=None):
        """All tokens at once, to train, or the next ones, to infer.

        Args:
            tokens: (B, N) integers.
            audio, lengths: as for `new_cache`.
            cache: of `new_cache`, in place of audio and lengths; holds the states after the tokens so far, moves on.

        Returns:
            (B, N, V).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape; both audio and a cache, or neither.
        """
        if (audio is None) == (cache is None):
            raise ValueError(f"{self.NAME}: either audio or a cache must be given")
        _checks.tensor(self.NAME, "tokens", tokens, dims=2, dtypes=(torch.int32, torch.int64))
        keep = cache is not None
        cache = cache if keep else self.new_cache(audio, lengths)
        x = self.embedding(tokens)
        for i, (layer, cross) in enumerate(zip(self.layers, self.cross)):
            y = self.norms[2 * i](x)
            x = x + (cache.advance(i, layer, y) if keep else layer(y))
            q = split(cross["q"](self.norms[2 * i + 1](x)), self.head_dim)
            x = x + cross["out"](merge(sparse_attention(q, *cache.heard[i], cache.mask)))
        return F.linear(self.norms[-1](x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, audio, begin, end, max_length, lengths=None):
        """Greedy decoding, token by token.

        Args:
            audio, lengths: as for `new_cache`.   begin, end: the tokens before the first and after the last.
            max_length: the most tokens of a row.

        Returns:
            (B, up to max_length) int64; a row that has ended goes on with `end`.
        """
        cache, found = self.new_cache(audio, lengths), []
        tokens = torch.full((audio.shape[0],), begin, device=audio.device)
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        while len(found) < max_length and not ended.all():
            tokens = self.forward(tokens[:, None], cache=cache)[:, 0].argmax(-1).masked_fill(ended, end)
            ended = ended | (tokens == end)
            found.append(tokens)
        return torch.stack(found, 1) if found else tokens.new_empty(audio.shape[0], 0)


class Cache:
    """Each layer's (keys, values) of the speech, which of them count, and the recurrences' states."""

    def __init__(self, heard, mask):
        self.heard, self.mask, self.states = heard, mask, [None] * len(heard)

    def advance(self, i, layer, x):
        if x.shape[1] == 1 and self.states[i] is not None and not torch.is_grad_enabled():
            return layer.step(x, *self.states[i])[0]  # in place
        y, self.states[i] = layer(x, initial_states=self.states[i], return_final_states=True)
        return y


def _cut(name, x, lengths):
    """x (B, channels, T), zero from each row's length on."""
    if lengths is None:
        return x
    _checks.tensor(name, "lengths", lengths, dims=1)
    _checks.shape(name, "lengths", lengths, (x.shape[0],))
    return x.masked_fill((torch.arange(x.shape[2], device=x.device) >= lengths[:, None])[:, None], 0)
