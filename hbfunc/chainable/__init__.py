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
functions (`scale_by_adam`, ...) call hbfunc's transforms of the same names.
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
from hbfunc.chainable.routes import Parallel, Route, route
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

no_state_no_multi_tensor = no_state_no_foreach  # HeavyBall 3's name

__all__ = [
    "BaseOpt",
    "ChainOpt",
    "FunctionTransform",
    "Parallel",
    "Route",
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
    "no_state_no_multi_tensor",
    "orthogonalize_update",
    "palm_beta2",
    "route",
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

_NEAREST = {  # what HeavyBall 3 has here and hbfunc has not
    **dict.fromkeys(("scale_by_nadam", "update_by_nadam"), "hbfunc.nadamw"),
    **dict.fromkeys(("scale_by_ademamix", "update_by_ademamix"), "hbfunc.ademamix"),
    **dict.fromkeys(("nesterov_ema", "mup_approx"), "nesterov_momentum"),
    **dict.fromkeys(("scale_by_kl_soap", "scale_by_kl_shampoo", "scale_by_soap_laprop"), "scale_by_soap"),
    **dict.fromkeys(("scale_by_soap_nadam", "scale_by_soap_ademamix", "scale_by_heavy_soap"), "scale_by_soap"),
    **dict.fromkeys(("scale_by_psgd_lra", "scale_by_lather"), "scale_by_psgd"),
    **dict.fromkeys(("scale_by_psgd_pro", "update_by_psgd_pro"), "hbfunc.psgd_pro"),
    "update_by_psgd_lra": "update_by_psgd",
    **dict.fromkeys(("scale_by_unscaled_adam", "scale_by_suds"), "scale_by_adam"),
    **dict.fromkeys(("update_by_adamc", "update_by_hyperball"), "update_by_adam"),
    "orthogonalize_grad_to_param": "hbfunc.orthograd",
    "sign": "hbfunc.lion, or a function of yours",
    "mars": "the option mars=True",
    "apply_update": "the end of every chain",
    "identity": "hbfunc.utils.identity",
    "global_clip": "gradient_clipping, given a function of all tensors",
    **dict.fromkeys(("WarmupGuard", "warmup_guard", "TagGuard", "SqueezeGrad"), "general_guard"),
}


def __getattr__(name: str) -> object:
    """Raise AttributeError; for what HeavyBall 3 has and hbfunc has not, with the nearest thing."""
    more = f": HeavyBall 3 has it, hbfunc has not; nearest: {_NEAREST[name]}" if name in _NEAREST else ""
    raise AttributeError(f"module 'hbfunc.chainable' has no attribute {name!r}{more}", name=name)
