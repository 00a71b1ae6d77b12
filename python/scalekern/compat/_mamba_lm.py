"""mamba_ssm's language model on scalekern's layers: config, stack of blocks, head, decoding, checkpoints.

Shape letters: B batch, L length, M model width, V vocabulary.

Parameter names and shapes are those of mamba_ssm.models.mixer_seq_simple, so its checkpoints load. Where upstream's
result is not what it says, ours is:
- With an MLP, the initial weights that end a residual branch are scaled for two branches a block; a second pass over
  upstream's model scales them for one.
- A row that has ended stays ended: decoding stops when every row has had its eos, not when all sample it at once.
- min_p is a share of the most likely token's probability, together with top_k and top_p.
- Attention's cached convolution keeps its inputs, not its outputs, and a cached token attends to every one before it.
- A residual in float64 stays in float64.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
import zipfile
from collections import namedtuple

import torch
from torch import nn

from scalekern.compat._mamba_blocks import (
    MHA,
    Block,
    GatedMLP,
    Mamba2Simple,
    RMSNorm,
    add_norm,
    at_least_float32,
    layer_norm_fn,
    rms_norm_fn,
)
from scalekern.compat._shims import MODULES as SHIMS
from scalekern.compat._shims import InferenceParams
from scalekern.nn import Mamba, Mamba2

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
LAYERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


@dataclasses.dataclass
class MambaConfig:
    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = dataclasses.field(default_factory=dict)
    attn_layer_idx: list = dataclasses.field(default_factory=list)
    attn_cfg: dict = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model, d_intermediate, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5, rms_norm=False,
    residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None,
):  # fmt: skip
    """A block whose mixer is ssm_cfg's "layer", "Mamba1" or "Mamba2", or MHA where attn_layer_idx has layer_idx."""
    factory = {"device": device, "dtype": dtype}
    cfg, mixer = copy.deepcopy(attn_cfg or {}), MHA
    if layer_idx not in (attn_layer_idx or []):
        cfg = copy.deepcopy(ssm_cfg or {})
        name = cfg.pop("layer", "Mamba1")
        if name not in LAYERS:
            raise ValueError(f"create_block: ssm_cfg's layer must be one of {', '.join(LAYERS)}, got {name!r}")
        mixer = LAYERS[name]
    mlp = functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model, functools.partial(mixer, layer_idx=layer_idx, **cfg, **factory),
        nn.Identity if d_intermediate == 0 else mlp,
        functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory),
        fused_add_norm, residual_in_fp32,
    )  # fmt: skip
    block.layer_idx = layer_idx
    return block


def _init_weights(module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1):
    """Of one module: biases 0, embeddings normal; the matrices that end a residual branch over the square root of how
    many branches there are (GPT-2)."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    for name, p in module.named_parameters() if rescale_prenorm_residual else ():
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
            with torch.no_grad():
                p /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Tokens (B, L) to hidden states (B, L, M): embedding, blocks, norm."""

    def __init__(
        self, d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None,
        norm_epsilon=1e-5, rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, i, **factory,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        options = {"n_residuals_per_layer": 1 if d_intermediate == 0 else 2, **(initializer_cfg or {})}
        self.apply(functools.partial(_init_weights, n_layer=n_layer, **options))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        layers = enumerate(self.layers)
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for i, layer in layers}

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        """input_ids (B, L) -> (B, L, M). Where cu_seqlens, which goes to every mixer, ends before L, zeros follow."""
        length, bounds = input_ids.shape[1], mixer_kwargs.get("cu_seqlens")
        if bounds is not None and not torch.compiler.is_compiling():  # upstream lets padding follow the last sequence
            input_ids = input_ids[:, : int(bounds[-1])]
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        out, _ = add_norm(self.norm_f, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)
        missing = length - out.shape[1]
        return nn.functional.pad(out, (0, 0, 0, missing)) if missing else out


@dataclasses.dataclass
class DecoderOnlyOutput:
    """What `generate` returns as transformers' class of that kind: fields by name and by place."""

    sequences: torch.Tensor
    scores: tuple | None = None

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else (self.sequences, self.scores)[key]


def penalized(logits, tokens, repetition_penalty):
    """logits (B, V) of the tokens (B, L) that were there: the positive ones over the penalty, the others times it."""
    if repetition_penalty == 1.0:
        return logits
    found = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(found < 0, found * repetition_penalty, found / repetition_penalty))


def sample(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0):
    """Tokens (B,) drawn from softmax(logits / temperature), logits (B, V), restricted one after the other to:

    top_k: the k highest; 1 is greedy, 0 no limit.   top_p: the fewest of the highest whose probabilities reach top_p;
    0 and 1 no limit.   min_p: those at least min_p times as probable as the first; 0 no limit.
    """
    if not (temperature > 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            "sample: temperature must be positive (top_k=1 is greedy), top_p and min_p in [0, 1], got "
            f"{temperature}, {top_p}, {min_p}"
        )
    if top_k == 1:
        return logits.argmax(-1)
    indices, logits = None, logits.to(at_least_float32(logits)) / temperature
    if top_k > 0 or 0 < top_p < 1:
        logits, indices = logits.topk(min(top_k, logits.shape[-1]) if top_k > 0 else logits.shape[-1], -1)
    p = logits.softmax(-1)  # sorted, where there are indices
    if 0 < top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0)
    if top_k <= 0 and indices is not None:  # drawn from in the vocabulary's order, as upstream: alike from a seed
        p, indices = p.scatter(-1, indices, p), None
    if min_p > 0:
        p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0)
    token = torch.multinomial(p, 1)
    return (token if indices is None else indices.gather(-1, token)).squeeze(-1)


@torch.no_grad()  # not inference_mode: what it returns can be trained on
def decode(
    input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0,
    eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, enable_timing=False, output_scores=False,
    streamer=None,
):  # fmt: skip
    """Continue the prompts input_ids (B, L), all of one length, up to max_length tokens with their prompt.

    Args:
        model: called as model(input_ids, position_ids=, inference_params=, num_last_tokens=1).logits.
        top_k, top_p, min_p, temperature: see `sample`.   repetition_penalty: on every token so far, the prompt's too.
        eos_token_id: a row that has drawn it goes on with nothing else; when all have, decoding ends.
        teacher_outputs: (B, at least L): the tokens to take as far as it goes, instead of drawn ones.
        vocab_size: ignore logits from there on.
        cg: accepted, without effect (upstream: CUDA graphs).   enable_timing: print the time that it took.
        output_scores: keep the logits of every step.
        streamer: its put() gets the prompt, then every step's tokens, on the CPU; then its end().

    Returns:
        .sequences (B, up to max_length), the prompt included; .scores: a (B, V) for each new token, or ().
    """
    batch, length = input_ids.shape
    if not 0 < length < max_length:
        raise ValueError(f"decode: the prompt must have 1 to max_length - 1 = {max_length - 1} tokens, got {length}")
    start, begin, scores = time.perf_counter(), 0, []
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    sequences = torch.cat([input_ids, input_ids.new_zeros(batch, max_length - length)], 1)
    ended = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    forced = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for end in range(length, max_length):
        positions = torch.full_like(input_ids[:, :1], begin) if begin else None
        tokens = sequences[:, begin:end]
        logits = model(tokens, position_ids=positions, inference_params=params, num_last_tokens=1).logits
        logits = logits[:, -1, :vocab_size]
        if output_scores:
            scores.append(logits)
        if end < forced:
            token = teacher_outputs[:, end]
        else:
            logits = penalized(logits, sequences[:, :end], repetition_penalty)
            token = sample(logits, top_k, top_p, min_p, temperature)
            token = token if eos_token_id is None else token.masked_fill(ended, eos_token_id)
        sequences[:, end] = token
        if streamer is not None:
            streamer.put(token[:, None].cpu())
        begin = params.seqlen_offset = end
        if eos_token_id is not None:
            ended = token == eos_token_id
            if ended.all():
                break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if sequences.is_cuda:
            torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - start):.0f}ms")
    return DecoderOnlyOutput(sequences[:, : begin + 1], tuple(scores))


class GenerationMixin:
    """`generate` for a model that `decode` can call."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        raise NotImplementedError

    def generate(
        self, input_ids, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, return_dict_in_generate=False,
        output_scores=False, **kwargs,
    ):  # fmt: skip
        """Tokens (B, up to max_length), or with return_dict_in_generate an object with them as .sequences and, with
        output_scores, .scores. kwargs: the others of `decode`, `cg` among them, which has no effect."""
        output = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs
        )
        output.scores = output.scores if output_scores else None
        return output if return_dict_in_generate else output.sequences


def _file(name, *choices):
    """The first of these files that is there, in the folder `name` or in the hub's repository of that name."""
    folder = pathlib.Path(name)
    if folder.is_dir():
        for choice in choices:
            if (folder / choice).is_file():
                return folder / choice
        raise FileNotFoundError(f"{folder} has no {' and no '.join(choices)}")
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise FileNotFoundError(f"no folder {name}; a name of the hub needs huggingface_hub installed") from None
    problem = None
    for choice in choices:
        try:
            return pathlib.Path(hub.hf_hub_download(str(name), choice))
        except EntryNotFoundError as error:  # the next choice may be there
            problem = problem or error
        except (OSError, ValueError) as error:  # no such repository, or no name of one
            problem = error
            break
    raise FileNotFoundError(f"no folder {name}, and nothing from the hub: {problem}") from problem


def load_config_hf(model_name):
    """The config.json of a folder or a hub's repository, as a dict."""
    return json.loads(_file(model_name, "config.json").read_text())


def load_state_dict_hf(model_name, device=None, dtype=None):
    """The tensors of a folder's or a hub's repository's pytorch_model.bin, or, without that, model.safetensors; all
    floating ones in `dtype`, if one is given. Nothing is unpickled but tensors."""
    path = _file(model_name, "pytorch_model.bin", "model.safetensors")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {n: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for n, t in state.items()}


def _write(path, save):
    """At once or not at all: save(a path beside it), then rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model of Mamba, Mamba-2 and attention layers: logits (B, L, V) of the next tokens."""

    def __init__(self, config, initializer_cfg=None, device=None, dtype=None):
        super().__init__()
        self.config, factory = config, {"device": device, "dtype": dtype}
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, **factory,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs):
        """input_ids (B, L) -> .logits (B, L, V), or of the last num_last_tokens if that is not 0. position_ids: not
        read. mixer_kwargs go to every layer: seq_idx, cu_seqlens, mask, as far as the layers have them."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden_states[:, -max(num_last_tokens, 0) :]))  # -0: all of them

    @classmethod
    def from_pretrained(cls, pretrained_model_name, device=None, dtype=None, **kwargs):
        """The model of a folder, or of the hub's repository of that name, with the config.json and the weights of
        upstream's format (state-spaces/mamba-130m; not mamba-130m-hf, which is transformers')."""
        data = load_config_hf(pretrained_model_name)
        if unknown := sorted(data.keys() - {f.name for f in dataclasses.fields(MambaConfig)}):
            raise ValueError(
                f"from_pretrained: the config.json of {pretrained_model_name} is not mamba_ssm's: MambaConfig has no "
                f"{', '.join(unknown[:5])}"
            )
        model = cls(MambaConfig(**data), device=device, dtype=dtype, **kwargs)
        state = load_state_dict_hf(pretrained_model_name)  # on the CPU as it is: each parameter takes it in its dtype
        if model.config.tie_embeddings and "backbone.embedding.weight" in state:  # safetensors hold it once
            state.setdefault("lm_head.weight", state["backbone.embedding.weight"])
        model.load_state_dict(state)
        return model

    def save_pretrained(self, save_directory):
        """Write config.json and pytorch_model.bin, each at once or not at all."""
        folder = pathlib.Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "pytorch_model.bin", lambda path: torch.save(self.state_dict(), path))
        text = json.dumps(vars(self.config), indent=4)
        _write(folder / "config.json", lambda path: path.write_text(text))


MODULES = {
    "mamba_ssm": SHIMS["mamba_ssm"] | {"MambaLMHeadModel": MambaLMHeadModel},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": MambaConfig},
    "mamba_ssm.models.mixer_seq_simple": {
        "MambaLMHeadModel": MambaLMHeadModel, "MixerModel": MixerModel, "create_block": create_block,
        "_init_weights": _init_weights, "MambaConfig": MambaConfig, "Mamba": Mamba, "Mamba2": Mamba2, "MHA": MHA,
        "GatedMLP": GatedMLP, "Block": Block, "GenerationMixin": GenerationMixin, "RMSNorm": RMSNorm,
        "layer_norm_fn": layer_norm_fn, "rms_norm_fn": rms_norm_fn, "load_config_hf": load_config_hf,
        "load_state_dict_hf": load_state_dict_hf,
    },
    "mamba_ssm.modules.mamba2_simple": {"Mamba2Simple": Mamba2Simple},
    "mamba_ssm.modules.block": {"Block": Block},
    "mamba_ssm.modules.mlp": {"GatedMLP": GatedMLP},
    "mamba_ssm.modules.mha": {"MHA": MHA},
    **dict.fromkeys(("mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm"), {  # the latter until 2.0
        "RMSNorm": RMSNorm, "layer_norm_fn": layer_norm_fn, "rms_norm_fn": rms_norm_fn,
    }),
    "mamba_ssm.utils.generation": {
        "GenerationMixin": GenerationMixin, "InferenceParams": InferenceParams, "decode": decode, "sample": sample,
    },
    "mamba_ssm.utils.hf": {"load_config_hf": load_config_hf, "load_state_dict_hf": load_state_dict_hf},
}  # fmt: skip
