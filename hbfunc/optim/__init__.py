"""Pure transforms as torch.optim.Optimizer classes, which keep their state and step parameters in place."""

from hbfunc.optim.groups import use_default
from hbfunc.optim.shim import StatefulOptimizer

__all__ = ["StatefulOptimizer", "use_default"]
