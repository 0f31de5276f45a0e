"""Checkpoints of other libraries as state dicts of hbfunc's classes, and back.

    state = torch.load("adamw.pt", weights_only=True)                      # of torch.optim.AdamW
    optimizer = hbfunc.AdamW(model.parameters())
    optimizer.load_state_dict(hbfunc.convert.from_torch(state))            # lr, betas, ... come along
    torch_optimizer.load_state_dict(hbfunc.convert.to_torch(optimizer.state_dict()))

    optimizer = hbfunc.SFAdamW(model.parameters())
    optimizer.load_state_dict(hbfunc.convert.from_schedulefree(state))     # of schedulefree's AdamW and SGD

    optimizer = hbfunc.SOAP(model.parameters(), ...)                       # the class and options of the old optimizer
    optimizer.load_state_dict(hbfunc.convert.from_heavyball(state, model.parameters()))

A run goes on with the next steps of the original, to rounding; a checkpoint that cannot go on so raises ValueError.
"""

from hbfunc.convert.heavyball import from_heavyball
from hbfunc.convert.schedulefree import from_schedulefree
from hbfunc.convert.torch_optim import from_torch, to_torch

__all__ = ["from_heavyball", "from_schedulefree", "from_torch", "to_torch"]
