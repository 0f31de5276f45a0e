"""The optimizers, each a chain that reads like its paper. A step is, in order,

    g -> MARS -> gradient_clipping -> rule -> update_clipping -> caution -> p * (1 - lr * weight_decay) - lr * u

Every recipe returns a Transform with its numbers in state["hyper"] (`with_hyperparameters`): floats, 0-dim tensors and
schedules are numbers, everything else is a choice that shapes the graph.

Arguments that all recipes share:
    lr: learning rate; `warmup_steps` > 0 makes it lr * min(1, t / warmup_steps).
    betas: decays of the first and second moment; in the state, beta1 and beta2.
    eps: lower bound of the root of the second moment.
    weight_decay: decoupled, scaled by the same rate.
    storage_dtype: of what is kept: "float32" (float64 for float64 parameters), "bfloat16", stochastically rounded, or
    "float64".
    mars, mars_gamma: variance-reduced gradients. caution: drop the updates that go against the gradient;
    caution_scaling=False does not rescale the others. No effect, and a warning, in rmsprop and sfadamw alone.
    gradient_clipping, update_clipping: a documented name, a pure function of a list of tensors, a Transform, or None.
    `clip_by` says which tensors a function is given.
    palm, beta2_scale: beta2 = 1 - t^(-beta2_scale).
    seed: of the random draws (an int, or an integer tensor under vmap); the key is in the state.
"""

from hbfunc.recipes.first_order import adamw, adopt, laprop, rmsprop, sfadamw
from hbfunc.recipes.orthogonal import muon, muon_laprop
from hbfunc.recipes.partitioned import matrices_to
from hbfunc.recipes.psgd import psgd_kron
from hbfunc.recipes.soap import soap

__all__ = ["adamw", "adopt", "laprop", "matrices_to", "muon", "muon_laprop", "psgd_kron", "rmsprop", "sfadamw", "soap"]
