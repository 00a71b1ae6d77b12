"""A linear layer whose weight is stored in a low-bit format and read as it is stored.

Shape letters: N outputs (out_features), K inputs (in_features), G groups of inputs.
"""

import math

import torch
from torch import nn

from scalekern import _checks, _dispatch, _library
from scalekern.ops._quant_matmul_cpu import products_of_kept
from scalekern.ops.quant_matmul import ACTIVATIONS, kept_weight, quant_matmul, quant_matmul_fwd, static_scale
from scalekern.quant import FORMATS, METHODS, QuantizedTensor, dequantize, quantize
from scalekern.quant._pack import row_bytes
from scalekern.quant._rotation import ROTATIONS, block_of, draw_signs, rotate, unrotate
from scalekern.quant.tensor import PART_DTYPES, PARTS, check_dtype
from scalekern.reference.quant_matmul import TRAINED

NAME = "nn.QuantLinear"
_STRIDED = torch.strided
SIGN_DTYPES = (torch.int8, *_checks.FLOATING)


class QuantLinear(nn.Module):
    """Maps (..., K) to (..., N): nn.Linear with a quantized weight. Made by `from_linear` or `from_quantized`.

    The parts of the weight are parameters without gradient, named weight_data (N, ceil(K bits / 8)) uint8,
    weight_scales (N, G), and where the format has them weight_zeros, weight_offsets, weight_outer and weight_perm. So
    they go where parameters go: state_dict, safetensors, `to(device)`, FSDP2 (which shards N). A change of dtype,
    `half()` or `to(torch.bfloat16)`, reaches the bias and what `weight` returns, and no part: uint8 stays uint8,
    float32 scales stay float32. A checkpoint's parts keep the dtypes that they have in it.

    `model.requires_grad_(True)` is refused by torch, since codes have no gradient: `requires_grad_` what shall train.
    A moving average of all parameters would average codes: leave out those that do not train.

    Args:
        in_features: K.   out_features: N.   bias: whether there is one.
        format, group_size, symmetric, scale_dtype: as for `scalekern.quant.quantize`.
        activation, activation_scale: as for `scalekern.quant_matmul`.
        rotation: None, or "hadamard" or "random_hadamard" (with random signs, from `seed`): the weight is stored
            rotated, and the input is rotated online; the product is the same, the rounding errors are others.
        train_scales: the floating scales, zeros, offsets and outer scales get gradients.
        device, dtype: of the bias and, for dtype, of `weight`. The weight starts as nn.Linear's, rounded.

    Raises:
        ValueError: a format, group size, activation or rotation that there is not.

    Source: Frantar et al., GPTQ, 2023 (weights by groups); Ashkboos et al., QuaRot, 2024 (rotation).
    """

    _kept = None  # what the parameters were (their ids) when it was last called without gradients, and their KeptWeight

    def __init__(
        self, in_features, out_features, bias=True, format="int4", *, group_size=128, symmetric=True, scale_dtype=None,
        activation=None, activation_scale=None, rotation=None, seed=0, train_scales=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least(NAME, "in_features", in_features, 0)
        _checks.at_least(NAME, "out_features", out_features, 0)
        dtype = dtype or torch.get_default_dtype()
        check_dtype(NAME, dtype)
        options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        if torch.empty(0, device=device).is_meta:
            weight = _on_meta(quantize(torch.zeros(2, in_features, dtype=dtype), format, **options), out_features)
        else:
            dense = torch.empty(out_features, in_features, device=device, dtype=dtype)
            nn.init.kaiming_uniform_(dense, a=math.sqrt(5)) if dense.numel() else None
            weight = quantize(dense, format, **options)
        if isinstance(bias, torch.Tensor):
            raise TypeError(f"{NAME}: bias must be True or False (from_quantized takes a tensor), got a Tensor")
        if bias:
            bound = in_features**-0.5 if in_features else 0.0
            bias = torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound)
        else:
            bias = None
        self._set(weight, bias, activation, activation_scale, rotation, seed)
        self.train_scales(train_scales)

    @classmethod
    def from_quantized(
        cls, weight, bias=None, *, activation=None, activation_scale=None, rotation=None, seed=0, train_scales=False
    ):
        """A layer of these very parts, views included: a weight (N, K), which for a rotation has been rotated."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(weight, bias, activation, activation_scale, rotation, seed)
        layer.train_scales(train_scales)
        return layer

    @classmethod
    def from_linear(
        cls, linear, format="int4", *, group_size=128, symmetric=True, scale_dtype=None, method="absmax",
        activation=None, activation_scale=None, rotation=None, seed=0, train_scales=False, inputs=None,
    ):  # fmt: skip
        """What rounds an nn.Linear's weight; its bias is shared.

        Args:
            linear: an nn.Linear, which does not change.
            method: a name in scalekern.quant.METHODS: "absmax", "least_squares" or "hqq".
            inputs: (..., K) inputs of the layer, for methods that look at them.
            The others: as for the class.
        """
        _checks.choice(NAME, "method", method, tuple(METHODS))
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{NAME}: linear must be an nn.Linear, got {type(linear).__name__}")
        if inputs is not None:
            _checks.tensor(NAME, "inputs", inputs, dims=range(1, 65), dtypes=_checks.FLOATING)
            _checks.shape(NAME, "inputs", inputs, (*inputs.shape[:-1], linear.in_features))
        signs = _signs(linear.in_features, rotation, seed, linear.weight.device)
        weight, turned = linear.weight.detach(), lambda x: x if rotation is None else rotate(x, signs)
        if rotation is not None:  # in float32, so that half precision is rounded once
            weight = turned(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        inputs = None if inputs is None else turned(inputs)
        options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        quantized = METHODS[method](weight, format, inputs=inputs, **options).to(dtype=linear.weight.dtype)
        return cls.from_quantized(
            quantized, linear.bias, activation=activation, activation_scale=activation_scale, rotation=rotation,
            seed=seed, train_scales=train_scales,
        ).train(linear.training)  # fmt: skip

    def _set(self, weight, bias, activation, activation_scale, rotation, seed):
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"{NAME}: weight must be a scalekern.quant.QuantizedTensor, got {type(weight).__name__}")
        weight.check(NAME)
        _checks.choice(NAME, "activation", activation, ACTIVATIONS)
        if activation_scale is not None:
            activation_scale = static_scale(NAME, activation_scale, activation)
        if len(weight.shape) != 2:
            raise ValueError(f"{NAME}: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None:  # forward does not look again
            _checks.tensor(NAME, "bias", bias, dims=1, dtypes=_checks.FLOATING)
            _checks.shape(NAME, "bias", bias, (self.out_features,))
            _checks.same_device(NAME, "weight", weight, bias=bias)
        self.format, self.group_size, self.dtype = weight.format, weight.group_size, weight.dtype
        self.activation, self.activation_scale, self.rotation = activation, activation_scale, rotation
        for name in PARTS:
            part = getattr(weight, name)
            self.register_parameter(f"weight_{name}", None if part is None else nn.Parameter(part, requires_grad=False))
        signs = _signs(self.in_features, rotation, seed, weight.device)
        signs = None if signs is None else nn.Parameter(signs, requires_grad=False)
        self.register_parameter("rotation_signs", signs)
        own = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if own else nn.Parameter(bias))

    def train_scales(self, mode: bool = True) -> "QuantLinear":
        """Whether the floating parts get gradients; those of 8 bits never do."""
        _checks.flag(NAME, "train_scales", mode)
        for name in ("scales", "zeros", "offsets", "outer"):
            if (part := getattr(self, f"weight_{name}")) is not None and part.dtype in TRAINED:
                part.requires_grad_(mode)
        return self

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """(N, K), of these parameters; rotated where the layer rotates."""
        parts = [getattr(self, f"weight_{name}") for name in PARTS]
        return QuantizedTensor(
            *parts, format=self.format, columns=self.in_features, group_size=self.group_size, dtype=self.dtype
        )

    @property
    def weight(self) -> torch.Tensor:
        """(N, K) the dense weight that the layer stands for, made anew: for code that reads `linear.weight`."""
        if self.rotation is None:
            return dequantize(self.quantized_weight)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return unrotate(dequantize(self.quantized_weight, wide), self.rotation_signs).to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # nn.Linear's name, by which models may pass it
        x = input
        dense = isinstance(x, torch.Tensor) and x.layout is _STRIDED
        if self.rotation is not None:
            if not dense or not x.dim() or x.shape[-1] != self.in_features:
                _checks.tensor(NAME, "x", x, dims=range(1, 65), dtypes=_checks.FLOATING)
                _checks.shape(NAME, "x", x, (*x.shape[:-1], self.in_features))
            x = rotate(x, self.rotation_signs)
        if dense and not torch.is_grad_enabled() and _library.is_plain((x,)):
            if (out := self._at_once(x)) is not None:
                return out
        own = self._parameters
        data = own["weight_data"]
        fits = dense and x.dim() > 1 and x.shape[-1] == self.in_features
        if fits and x.dtype in _checks.FLOATING and own["weight_perm"] is None and x.device == data.device:
            # What else quant_matmul would check held when the parts were put in, and training has no time for it.
            parts = own["weight_scales"], own["weight_zeros"], own["weight_offsets"], own["weight_outer"], own["bias"]
            if self._are_of_its_size(data, *parts):
                options = self.format, self.group_size, self.activation or "", self.activation_scale
                return quant_matmul_fwd(x, data, *parts, None, *options, None)
        return quant_matmul(
            x, self.quantized_weight, bias=self.bias, activation=self.activation,
            activation_scale=self.activation_scale,
        )  # fmt: skip

    def _are_of_its_size(self, data, scales, zeros, offsets, outer, bias) -> bool:
        """Whether parts that may have been put in since are still of the sizes that kernels go by: 1.2 us."""
        N, groups = self.out_features, -(-self.in_features // self.group_size)
        if data.shape != (N, row_bytes(self.in_features, FORMATS[self.format].bits)):
            return False
        for part, width in ((scales, groups), (zeros, groups), (offsets, groups), (outer, 1)):
            if part is not None and part.shape != (N, width) and part.shape != (1, width):
                return False
        return bias is None or bias.shape == (N,)

    def _at_once(self, x):
        """The product with what the layer held when it was last called, on the CPU 5 us before the kernel begins where
        the op takes 23; None where it is not for the native call."""
        on_cpu = x.is_cpu
        if not _dispatch.allows("cpu" if on_cpu else "cuda"):
            return None
        kept = self._held()
        return kept.product(x) if kept and kept.is_cpu is on_cpu else None

    def _held(self):
        """The KeptWeight of what the layer holds now; None of what the native call does not serve."""
        own = self._parameters
        now = *map(id, own.values()), self.format, self.group_size, self.activation, self.activation_scale
        if self._kept is None or self._kept[0] != now or not self._kept[1].is_where_it_was():
            *parts, perm = [own[f"weight_{name}"] for name in PARTS]
            options = self.format, self.group_size, self.activation or "", self.activation_scale
            if perm is None:  # the native call goes by these sizes
                self.quantized_weight.check(NAME)
                if own["bias"] is not None:
                    _checks.shape(NAME, "bias", own["bias"], parts[0].shape[:1])
                    _checks.same_device(NAME, "weight", parts[0], bias=own["bias"])
            found = kept_weight(self.in_features, *parts, own["bias"], *options) if perm is None else None
            self._kept = found and (now, found)
        return self._kept and self._kept[1]

    def __getstate__(self) -> dict:
        """For copies and pickles: without what was kept for the next call, which goes by the parameters' ids."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def extra_repr(self) -> str:
        bits = 8 * self.quantized_weight.nbytes / max(1, self.in_features * self.out_features)
        rest = {"activation": self.activation, "rotation": self.rotation}
        return ", ".join([
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"format={self.format!r}, group_size={self.group_size}, {bits:.2f} bits a weight",
            *(f"{name}={value!r}" for name, value in rest.items() if value is not None),
        ])  # fmt: skip

    def _own(self) -> dict[str, nn.Parameter]:
        """The parameters that are no numbers of the model's dtype."""
        return {n: p for n, p in self._parameters.items() if p is not None and n != "bias"}

    def _apply(self, fn, recurse=True):
        """Parts move, and keep their dtypes."""
        own = {id(t) for p in self._own().values() for t in (p, p.grad) if t is not None}

        def moved(t):
            changed = fn(t)
            kept = id(t) not in own or changed.dtype == t.dtype
            return changed if kept else t.to(changed.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_data.device)).dtype
        return super()._apply(moved, recurse)

    def state_dict(self, *args, prefix="", **options):
        """With what the parts mean in its metadata, which goes where torch.save takes it and adds no names."""
        prefix = args[1] if len(args) > 1 else prefix  # as nn.Module still allows
        found = super().state_dict(*args, **({} if len(args) > 1 else {"prefix": prefix}), **options)
        if hasattr(found, "_metadata"):
            found._metadata.setdefault(prefix[:-1], {}).update(self._meaning())
        return found

    def _meaning(self) -> dict:
        """What a checkpoint's parts do not tell by themselves. A row's one group is one of any size from K on."""
        group_size = min(self.group_size, max(1, self.in_features))
        own = {"format": self.format, "in_features": self.in_features, "group_size": group_size}
        return {**own, "rotation": self.rotation}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """A part takes the dtype that it has in a checkpoint, rather than be rounded to this layer's."""
        for name, own in self._meaning().items():  # parts of another format may have the very same shapes
            if (found := local_metadata.get(name, own)) != own:
                raise ValueError(f"{NAME}: {prefix}weight must have {name} {own!r}, the checkpoint's has {found!r}")
        for name, part in self._own().items():
            found = state_dict.get(prefix + name)
            allowed = PART_DTYPES.get(name.removeprefix("weight_"), SIGN_DTYPES)
            if isinstance(found, torch.Tensor) and found.dtype not in allowed:
                names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
                raise TypeError(f"{NAME}: {prefix}{name} must have dtype {names}, got {found.dtype}")
        for name, part in self._own().items():
            found = state_dict.get(prefix + name)
            if isinstance(found, torch.Tensor) and found.dtype != part.dtype and found.shape == part.shape:
                trained = part.requires_grad and found.dtype in TRAINED
                self._parameters[name] = nn.Parameter(torch.empty_like(part, dtype=found.dtype), requires_grad=trained)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def products(x, *layers) -> list:
    """[layer(x) for each]: of QuantLinears on the CPU without gradients in one native call. Three of 128 x 128 take
    25 us in it, three calls 40."""
    if type(layers[0]) is QuantLinear and not torch.is_grad_enabled() and _library.is_plain((x,)):
        first = layers[0]
        kept = x.is_cpu and x.layout is _STRIDED and _dispatch.allows("cpu")
        kept = kept and all([_alike(first, layer) for layer in layers])
        kept = [layer._held() for layer in layers] if kept else [None]
        if all([own and own.is_cpu for own in kept]):
            turned = x if first.rotation is None else rotate(x, first.rotation_signs)
            if (found := products_of_kept(turned, kept)) is not None:
                return found
    return [layer(x) for layer in layers]


def _alike(first, layer) -> bool:
    """Whether a layer that nobody watches rotates its input as the first one does."""
    return (
        type(layer) is QuantLinear and not layer._forward_hooks and not layer._forward_pre_hooks
        and layer.rotation == first.rotation and (layer is first or layer._parameters["rotation_signs"] is None)
    )  # fmt: skip


def _signs(K, rotation, seed, device):
    _checks.choice(NAME, "rotation", rotation, ROTATIONS)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{NAME}: seed must be an integer, got {seed!r}")
    if rotation is None:
        return None
    if block_of(K) == 1:
        raise ValueError(f"{NAME}: rotation must be None for {K} columns, of no Hadamard order, got {rotation!r}")
    return draw_signs(K, rotation, seed, device)


def _on_meta(weight: QuantizedTensor, N: int) -> QuantizedTensor:
    """The shapes of N rows out of those of two."""
    rows = lambda t: (N if t.shape[-2] == 2 else 1, t.shape[-1])
    return weight.replace(**{n: t.new_empty(rows(t), device="meta") for n, t in weight.tensors().items()})
