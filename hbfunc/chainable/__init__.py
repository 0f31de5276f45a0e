"""The documented composition API: optimizers made of functions (state, group, update, grad, param) -> update.

    from hbfunc import chainable as C

    @C.zero_guard("momentum")
    @C.no_state
    def heavy(group, update, grad, param, momentum):
        for u, m in zip(update, momentum):
            m.mul_(0.9).add_(u)
        return momentum

    class Mine(C.BaseOpt):
        def __init__(self, params, lr=1e-3, weight_decay=0):
            super().__init__(params, dict(lr=lr, weight_decay=weight_decay), True, None, None, False, heavy)

    tx = hbfunc.chain(C.as_transform(heavy), hbfunc.scale_by_learning_rate(1e-3))    # the same, as a pure transform

`update`, `grad` and `param` are lists of tensors; a function may work in place or return new tensors. The predefined
functions (`scale_by_adam`, ...) are faces of hbfunc's transforms.
"""

from hbfunc.chainable.guards import (
    FunctionTransform,
    SkipUpdate,
    copy_guard,
    general_guard,
    no_state,
    no_state_no_foreach,
    zero_guard,
)
from hbfunc.chainable.lift import as_transform
from hbfunc.chainable.optimizers import BaseOpt, ChainOpt, ScheduleFree, chain, str_or_fn
from hbfunc.chainable.rules import (
    exp_avg,
    heavyball_momentum,
    nesterov_momentum,
    orthogonalize_update,
    palm_beta2,
    scale_by_adam,
    scale_by_adopt,
    scale_by_delayed_psgd,
    scale_by_exp_avg_sq,
    scale_by_laprop,
    scale_by_psgd,
    scale_by_soap,
    update_by_adam,
    update_by_adopt,
    update_by_delayed_psgd,
    update_by_laprop,
    update_by_psgd,
    update_by_schedule_free,
)
from hbfunc.optim.groups import use_default

__all__ = [
    "BaseOpt",
    "ChainOpt",
    "FunctionTransform",
    "ScheduleFree",
    "SkipUpdate",
    "as_transform",
    "chain",
    "copy_guard",
    "exp_avg",
    "general_guard",
    "heavyball_momentum",
    "nesterov_momentum",
    "no_state",
    "no_state_no_foreach",
    "orthogonalize_update",
    "palm_beta2",
    "scale_by_adam",
    "scale_by_adopt",
    "scale_by_delayed_psgd",
    "scale_by_exp_avg_sq",
    "scale_by_laprop",
    "scale_by_psgd",
    "scale_by_soap",
    "str_or_fn",
    "update_by_adam",
    "update_by_adopt",
    "update_by_delayed_psgd",
    "update_by_laprop",
    "update_by_psgd",
    "update_by_schedule_free",
    "use_default",
    "zero_guard",
]
