"""Derivatives of trainings: by their hyperparameters, by where they start, and by what a converged one depends on.

* `hypergradient` and `unroll`: through T steps, with memory for a few of them, or through the last few only.
* `adapt`: an inner loop of any rule, for meta-learning (MAML, its first-order form, learned rates per parameter).
* `implicit_gradient`: of the minimum of an inner problem, without its path.
"""

from hbfunc.hypergrad.implicit import implicit_gradient
from hbfunc.hypergrad.inner import adapt
from hbfunc.hypergrad.unrolled import checkpoint, hypergradient, unroll

__all__ = ["adapt", "checkpoint", "hypergradient", "implicit_gradient", "unroll"]
