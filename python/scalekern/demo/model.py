"""A byte-level language model of Mamba or Mamba-2, H3 and attention blocks, its one-token form and generation with it.

Shape letters: B batch, L length, D width of the model, H heads, P head dim; 256 byte values.
"""

import dataclasses

import torch
import torch.nn as nn

import scalekern
from scalekern import masks
from scalekern.nn import H3, Mamba, Mamba2

BYTES = 256
ARCHES = {"mamba": "Mamba", "mamba2": "Mamba-2"}  # what --arch may name, and what it is called


@dataclasses.dataclass(frozen=True)
class Config:
    arch: str = "mamba"
    width: int = 128
    layers: int = 4
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    ssd_state: int = 64  # Mamba-2's, whose states are cheaper than Mamba's
    headdim: int = 64
    h3_state: int = 32
    heads: int = 4
    window: int = 64
    sinks: int = 4


class Attention(nn.Module):
    """Causal attention of a window and the first few tokens; the blocks before it have told positions apart."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kept = config.heads, (config.sinks, config.window)
        self.mask = masks.causal & (masks.window(config.window - 1, 0) | masks.sink(config.sinks))
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, hidden: torch.Tensor, return_final_states: bool = False):
        q, k, v = self._heads(hidden)
        out = self._merged(scalekern.sparse_attention(q, k, v, self.mask))
        if not return_final_states:
            return out
        sinks, window = self.kept
        states = torch.stack([k, v])
        if k.shape[2] > sinks + window:
            states = torch.cat([states[..., :sinks, :], states[..., -window:, :]], -2)
        return out, states

    def step(self, hidden: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token (B, 1, D); the states are the keys and values that it or a later one can see, (2, B, H, T, P)."""
        heads, (sinks, window) = self._heads(hidden), self.kept
        full = states.shape[-2] >= sinks + window  # the oldest of the window makes place
        kept = (states[..., :sinks, :], states[..., states.shape[-2] + 1 - window :, :]) if full else (states,)
        states = torch.cat([*kept, heads[1:]], -2)
        return self._merged(scalekern.sparse_attention(heads[0], states[0], states[1])), states

    def _heads(self, hidden):
        return self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _merged(self, out):
        return self.out_proj(out.transpose(1, 2).flatten(2))


def _recurrence(config: Config) -> nn.Module:
    shape = {"d_conv": config.d_conv, "expand": config.expand}
    if config.arch == "mamba2":
        return Mamba2(config.width, d_state=config.ssd_state, headdim=config.headdim, **shape)
    return Mamba(config.width, d_state=config.d_state, **shape)


class Block(nn.Module):
    """x + mixer(RMSNorm(x)): a recurrence that its input controls (Mamba or Mamba-2), a long convolution between gates
    (H3), a recurrence, attention, and so on."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        if index % 2 == 0:
            self.mixer = _recurrence(config)
            last = self.mixer.out_proj
        elif index % 4 == 3:
            self.mixer = Attention(config)
            last = self.mixer.out_proj
        else:
            self.mixer = H3(config.width, d_state=config.h3_state)
            last = self.mixer.output_linear
        # Each layer adds to the residual stream: scaled so that its variance at the start does not grow with depth.
        with torch.no_grad():
            last.weight /= config.layers**0.5

    def step(self, hidden: torch.Tensor, states: tuple) -> tuple[torch.Tensor, tuple]:
        """One token (B, 1, D), and the states after it."""
        if isinstance(self.mixer, (Mamba, Mamba2)):  # in place
            mixed, _, _ = self.mixer.step(self.norm(hidden), *states)
        elif isinstance(self.mixer, H3):
            states, coefficients = states
            mixed, states = self.mixer.step(self.norm(hidden), states, coefficients)
            states = states, coefficients
        else:
            mixed, states = self.mixer.step(self.norm(hidden), states)
        return hidden + mixed, states


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out. The head shares the embedding's weight."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=1e-5)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(hidden), self.embedding.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) int64 to logits (B, L, 256)."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block.mixer(block.norm(hidden))
        return self.head(hidden)

    def prefill(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
        """A whole prompt (B, L) at once: logits (B, 256) after its last byte, and each layer's states there."""
        hidden, cache = self.embedding(tokens), []
        for block in self.blocks:
            mixed, states = block.mixer(block.norm(hidden), return_final_states=True)
            hidden = hidden + mixed
            # H3's step takes what its parameters become once discretized.
            cache.append((states, block.mixer.discretize()) if isinstance(block.mixer, H3) else states)
        return self.head(hidden[:, -1]), cache

    def step(self, tokens: torch.Tensor, cache: list) -> torch.Tensor:
        """One byte for each row (B,); `cache` moves on in place; logits (B, 256)."""
        hidden = self.embedding(tokens)[:, None]  # (B, 1, D)
        for i, block in enumerate(self.blocks):
            hidden, cache[i] = block.step(hidden, cache[i])
        return self.head(hidden[:, 0])


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: torch.Tensor, count: int, *, temperature: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` bytes after each `prompt` (B, L), prefilled at once and then one by one.

    Returns (tokens (B, count), the logits they were drawn from (B, count, 256)). temperature 0 takes the likeliest.
    """
    generator = torch.Generator().manual_seed(seed)
    first, cache = model.prefill(prompt)
    logits = [first]
    tokens = [_draw(first, temperature, generator)]
    while len(tokens) < count:
        logits.append(model.step(tokens[-1], cache))
        tokens.append(_draw(logits[-1], temperature, generator))
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    chances = torch.softmax(logits.cpu() / temperature, -1)  # on the host: one generator for every device
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
