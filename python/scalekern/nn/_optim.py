"""What optimizers read off a parameter: `_optim`, its own learning rate and weight decay (state-spaces/s4's hook)."""

from torch import nn


def hint(parameter, lr=None, wd=0.0):
    """Mark a parameter; `lr` None leaves the learning rate to the optimizer."""
    parameter._optim = {"weight_decay": wd} if lr is None else {"lr": lr, "weight_decay": wd}
    return parameter


def register(module, name, tensor, lr=None, wd=0.0):
    """A parameter of the module with that mark, or with lr 0 a buffer: the key in a checkpoint is the same."""
    if lr == 0.0:
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, hint(nn.Parameter(tensor), lr, wd))
