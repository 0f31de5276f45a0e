"""Transforms as torch.optim classes: the stateful shim."""

from hbfunc.optim.shim import StatefulOptimizer, use_default

__all__ = ["StatefulOptimizer", "use_default"]
