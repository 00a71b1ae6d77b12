"""torch's flex_attention interface on sparse_attention: a BlockMask becomes a mask of scalekern.masks."""
from torch.nn.attention.flex_attention import BlockMask
