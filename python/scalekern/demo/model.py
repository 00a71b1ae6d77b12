"""A byte-level language model of Mamba and H3 blocks by turns, its one-token form and generation with it.

Shape letters: B batch, L length, D width of the model; 256 byte values.
"""

import dataclasses

import torch
import torch.nn as nn

from scalekern.nn import H3, Mamba

BYTES = 256


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 128
    layers: int = 4
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    h3_state: int = 32


class Block(nn.Module):
    """x + mixer(RMSNorm(x)): a recurrence that its input controls (Mamba), then a long convolution between gates (H3)."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        if index % 2 == 0:
            self.mixer = Mamba(config.width, d_state=config.d_state, d_conv=config.d_conv, expand=config.expand)
            last = self.mixer.out_proj
        else:
            self.mixer = H3(config.width, d_state=config.h3_state)
            last = self.mixer.output_linear
        # Each layer adds to the residual stream: scaled so that its variance at the start does not grow with depth.
        with torch.no_grad():
            last.weight /= config.layers**0.5

    def step(self, hidden: torch.Tensor, states: tuple) -> tuple[torch.Tensor, tuple]:
        """One token (B, 1, D), and the states after it."""
        if isinstance(self.mixer, H3):
            mixed, states = self.mixer.step(self.norm(hidden), states)
        else:  # in place
            mixed, _, _ = self.mixer.step(self.norm(hidden), *states)
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
            cache.append(states)
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
