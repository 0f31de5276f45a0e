"""Transforms as torch.optim classes: the stateful shim."""

from hbfunc.optim.groups import use_default
from hbfunc.optim.shim import StatefulOptimizer

__all__ = ["StatefulOptimizer", "use_default"]
