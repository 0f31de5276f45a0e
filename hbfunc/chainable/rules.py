"""The predefined functions: each is a `Face` of a transform, and has no mathematics of its own.

Called in the documented style, a face reads the hyperparameters of the group, runs the pure transform, and keeps its
state in the dicts of the parameters. In an optimizer or a lifted chain the transform itself is used (`Face.transform`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.chainable.guards import FunctionTransform, Group, SkipUpdate, Tensors, entries_of
from hbfunc.combinators import caution
from hbfunc.contract import Transform
from hbfunc.contract import chain as chain_
from hbfunc.leaves import Leaves, compute_dtype
from hbfunc.optim.state import adopt, per_parameter
from hbfunc.precision import round_to_parameters
from hbfunc.schedules import Decay, after_first
from hbfunc.schedules import palm_beta2 as palm_schedule
from hbfunc.transforms import adaptive, momentum, orthogonal, psgd, soap, steps
from hbfunc.transforms.schedule_free import schedule_free


class Face(FunctionTransform):
    """A function in the documented style that calls a transform. fn: (group, **options) -> Transform."""

    def transform(self, group: Group, **options: Any) -> Transform:
        """The transform with the hyperparameters of a group."""
        return self.fn(group, **options)

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        return self.run(self.transform(group, **kwargs), state, update, grad, param)

    def run(self, transform: Transform, state: Any, update: Tensors, grad: Tensors, param: Tensors) -> list[Tensor]:
        """Run the transform on state from the dicts of the parameters, put the new state back; returns the updates."""
        paths = [str(i) for i in range(len(param))]
        leaves = Leaves(zip(paths, param, strict=True))
        entries = {path: entries_of(state, p) for path, p in leaves.items()}
        functional = transform.init(leaves)
        layout = {} if transform.layout is None else transform.layout(leaves)
        views = per_parameter(functional, layout, paths)
        names = {name: self.val_name(name) for path in paths for name in views[path]}
        stored = {path: {n: entries[path][key] for n, key in names.items() if key in entries[path]} for path in paths}
        adopt(views, {path: values for path, values in stored.items() if values})
        extras = {"grads": _computed(grad, leaves)} if "grads" in transform.needs else {}
        updates, functional = transform.update(functional, _computed(update, leaves), leaves, **extras)
        for path, values in per_parameter(functional, layout, paths).items():
            entries[path].update({names[name]: x for name, x in values.items()})
        return [updates[path] for path in paths]

    @torch.no_grad()
    def move(self, transform: Transform, state: Any, update: Tensors, grad: Tensors, param: Tensors) -> None:
        """Add the transform's updates to the parameters, in place."""
        for p, u in zip(param, self.run(transform, state, update, grad, param), strict=True):
            p.copy_(p.to(u.dtype) + u)


class UpdateBy(Face):
    """A face that steps the parameters itself, with the group's lr, weight decay and caution, and skips the rest."""

    def __init__(self, name: str, scale_by: Face) -> None:
        def fn(group: Group, **options: Any) -> Transform:
            return scale_by.transform(group, **options)

        fn.__name__, fn.__doc__, fn.__module__ = name, f"{scale_by.fn_name}, then the step.", __name__
        super().__init__(fn)
        self.scale_by = scale_by

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        self.move(chain_(*self.whole(group, **kwargs)), state, update, grad, param)
        raise SkipUpdate(f"{self.fn_name} has moved the parameters")

    def whole(self, group: Group, **options: Any) -> list[Transform]:
        """The transform with the step behind it."""
        scaled = self.transform(group, **options)
        return [scaled, *ending(group, scaled.first_step_moves)]


class ScheduleFreeFace(UpdateBy):
    """A face that steps by Schedule-Free in place of a learning rate."""

    def __init__(self, fn: Callable[..., Transform]) -> None:
        super().__init__("update_by_schedule_free", Face(fn))
        self.__doc__ = fn.__doc__

    def whole(self, group: Group, **options: Any) -> list[Transform]:
        step = self.transform(group, **options)
        return [*agreeing(group), decayed(group), step, round_to_parameters(group.get("seed", 0))]


class PalmBeta2(float):
    """beta2 of this step, for functions that read the group; `decay` is the schedule, not debiased in averages."""

    decay: Decay


def ending(group: Group, first_step_moves: bool = True) -> list[Transform]:
    """The transform from the update to the change of the parameters."""
    rate = steps.scale_by_learning_rate(group["lr"])
    return [*agreeing(group), decayed(group, first_step_moves), rate, round_to_parameters(group.get("seed", 0))]


def agreeing(group: Group) -> list[Transform]:
    """The transform `caution` if the group asks for it, else the identity."""
    return [caution(group.get("caution_scaling", utils.caution_scaling))] if group.get("caution") else []


def decayed(group: Group, first_step_moves: bool = True) -> Transform:
    """The transform of weight decay, which begins with the first step that moves the parameter."""
    decay = group.get("weight_decay", 0.0)
    return steps.add_decayed_weights(decay if first_step_moves else after_first(decay))


def _computed(tensors: Sequence[Tensor], leaves: Leaves) -> dict[str, Tensor]:
    return {k: x.to(compute_dtype(p)) for (k, p), x in zip(leaves.items(), tensors, strict=True)}


def _given(group: Group, *names: str, **options: Any) -> dict[str, Any]:
    """The arguments for a transform that the group has: betas as beta1 and beta2, or one of them as `beta`."""
    betas = {}
    if "betas" in group:
        first, second = group["betas"]
        betas = {"beta": first, "beta1": first, "beta2": second.decay if isinstance(second, PalmBeta2) else second}
    elif "beta" in group:
        betas = {"beta": group["beta"], "beta1": group["beta"]}
    known = {**group, **betas, **options}
    return {name: known[name] for name in names if known.get(name) is not None}


@Face
def exp_avg(group: Group) -> Transform:
    """The debiased average of the updates, with betas[0]."""
    return momentum.exp_avg(**_given(group, "beta"))


@Face
def heavyball_momentum(group: Group) -> Transform:
    """The heavy ball, with betas[0]."""
    return momentum.heavyball_momentum(**_given(group, "beta"))


@Face
def nesterov_momentum(group: Group) -> Transform:
    """Nesterov's momentum, with betas[0]."""
    return momentum.nesterov_momentum(**_given(group, "beta"))


@Face
def scale_by_exp_avg_sq(group: Group) -> Transform:
    """RMSprop, debiased, with betas[1] and eps."""
    return adaptive.scale_by_exp_avg_sq(**_given(group, "beta2", "eps"))


@Face
def scale_by_adam(group: Group) -> Transform:
    """Adam, with betas and eps."""
    return adaptive.scale_by_adam(**_given(group, "beta1", "beta2", "eps"))


@Face
def scale_by_laprop(group: Group) -> Transform:
    """LaProp, with betas and eps."""
    return adaptive.scale_by_laprop(**_given(group, "beta1", "beta2", "eps"))


@Face
def scale_by_adopt(group: Group) -> Transform:
    """ADOPT, with betas, eps, clip_exp and debias."""
    given = _given(group, "beta1", "beta2", "eps", "debias")
    return adaptive.scale_by_adopt(**given, clip_exp=group.get("clip_exp", 0.25))  # None means no clip


@Face
def orthogonalize_update(group: Group) -> Transform:
    """Muon's orthogonalization, by the method `utils.zeroth_power_mode`."""
    return orthogonal.orthogonalize(group.get("orthogonalizer", utils.zeroth_power_mode))


_SOAP = (
    *("beta1", "beta2", "shampoo_beta", "eps", "max_precond_dim", "merge_dims", "precondition_1d", "normalize_grads"),
    *("data_format", "correct_bias", "split", "inner", "seed", "stop_gradient"),
    *("precondition_frequency", "use_precond_schedule", "precond_scheduler"),
)


def _soap_options(group: Group, options: Group) -> Group:
    # In the original's groups there is one or the other, and which one says what is meant.
    random = "precond_scheduler" in group and "precondition_frequency" not in group
    return {"use_precond_schedule": group.get("use_precond_schedule", random), **options}


@Face
def scale_by_soap(group: Group, **options: Any) -> Transform:
    """SOAP, with the options of `hbfunc.soap` that the group has; `inner="laprop"` by keyword."""
    return soap.scale_by_soap(**_given(group, *_SOAP, **_soap_options(group, options)))


_PSGD = (
    *("precond_lr", "precond_init_scale", "max_size_triangular", "min_ndim_triangular", "memory_save_mode"),
    *("momentum_into_precond_update", "merge_dims", "split", "store_triu_as_line", "q_dtype", "seed"),
    *("preconditioner_update_probability", "stochastic_schedule"),
)


def _psgd_options(group: Group, cached: bool | None, prob: Any) -> Group:
    return {"cached": group.get("cached", False) if cached is None else cached} | (
        {} if prob is None else {"preconditioner_update_probability": prob}
    )


def _psgd(name: str, delayed: bool) -> Face:
    def fn(group: Group, cached: bool | None = None, prob: Any = None) -> Transform:
        return psgd.scale_by_psgd(
            **_given(group, *_PSGD, "cached", **_psgd_options(group, cached, prob)), delayed=delayed
        )

    fn.__name__, fn.__module__ = name, __name__
    fn.__doc__ = "PSGD-Kron, with the options of `hbfunc.psgd_kron` that the group has; `cached` and `prob` by keyword."
    return Face(fn)


scale_by_psgd = _psgd("scale_by_psgd", delayed=False)
scale_by_delayed_psgd = _psgd("scale_by_delayed_psgd", delayed=True)
update_by_adam = UpdateBy("update_by_adam", scale_by_adam)
update_by_laprop = UpdateBy("update_by_laprop", scale_by_laprop)
update_by_adopt = UpdateBy("update_by_adopt", scale_by_adopt)
update_by_psgd = UpdateBy("update_by_psgd", scale_by_psgd)
update_by_delayed_psgd = UpdateBy("update_by_delayed_psgd", scale_by_delayed_psgd)


@ScheduleFreeFace
def update_by_schedule_free(group: Group) -> Transform:
    """Schedule-Free's step, with lr, betas[0], weight_lr_power and r."""
    return schedule_free(**_given(group, "lr", "beta1", "weight_lr_power", "r"))


def palm_beta2(state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors) -> Tensors:
    """Set betas[1] to 1 - step^(-beta2_scale) for the functions that follow (PaLM, Chowdhery et al. 2022); averages
    with it are not debiased again. Reads group["step"], from 1, and group["beta2_scale"]."""
    schedule = palm_schedule(group.get("beta2_scale", 0.8))
    beta2 = PalmBeta2(schedule(torch.as_tensor(group["step"], dtype=torch.float64)))
    beta2.decay = schedule
    group["betas"] = (group["betas"][0], beta2)
    return update
