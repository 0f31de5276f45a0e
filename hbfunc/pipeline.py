"""What every recipe is made of besides its rule: one pipeline for all. A step is, in order,

    g -> MARS -> max_grad_norm -> gradient_clipping -> rule -> update_clipping -> caution
      -> p - lr * (u + weight_decay * p)

    @recipe
    def lion(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **common):
        return around("lion", scale_by_lion, lr=lr, betas=betas, weight_decay=weight_decay, **common)

The numbers of a recipe are in its state, under "hyper" (`with_hyperparameters`): floats, 0-dim tensors and schedules
are numbers, everything else is a choice that shapes the graph. Options that all recipes share are the arguments of
`around` that have a default.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict

from torch import Tensor

from hbfunc.combinators import caution as caution_
from hbfunc.combinators import mars_correction, with_hyperparameters
from hbfunc.contract import Transform, chain, remembered
from hbfunc.forms import meant, short
from hbfunc.parametric import ParametricSchedule, check_schedule_number, is_schedule_value
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.ranges import check_choice, check_number
from hbfunc.schedules import Number, after_first, palm_beta2, per_peak, warmup
from hbfunc.transforms.clipping import Clip, clip_by
from hbfunc.transforms.hyperball import hyperball as hyperball_
from hbfunc.transforms.hyperball import outside_of_spheres
from hbfunc.transforms.norms import clip_by_global_norm
from hbfunc.transforms.schedule_free import schedule_free as schedule_free_
from hbfunc.transforms.steps import Mask, add_decayed_weights, scale_by_learning_rate

Clipping = str | Clip | Transform | None
Betas = Sequence[Number]

SCHEDULES = (  # the numbers that may be functions of the step
    *("lr", "beta", "beta1", "beta2", "beta3", "momentum", "alpha", "beta2_scale", "shampoo_beta", "slow_beta"),
    *("weight_decay", "preconditioner_update_probability"),
)
_INF = float("inf")
RANGES = {  # of hyperparameters: from, to, and whether each end is left out
    **dict.fromkeys(("lr", "eps", "weight_decay", "mars_gamma", "beta2_scale", "precond_lr"), (0, _INF, False, True)),
    **dict.fromkeys(("clip_exp", "alpha", "lr_peak"), (0, _INF, False, True)),
    "max_grad_norm": (0, _INF, True, False),
    "warmup_steps": (0, _INF, False, True),
    **dict.fromkeys(("beta", "beta1", "beta2", "beta3", "momentum", "shampoo_beta", "slow_beta"), (0, 1, False, True)),
    "dampening": (0, 1, False, False),
    **dict.fromkeys(("precond_init_scale", "d0", "d_coef"), (0, _INF, True, True)),
    "momentum_decay": (0, _INF, False, True),
    "growth_rate": (1, _INF, False, True),
    "preconditioner_update_probability": (0, 1, False, False),
    **dict.fromkeys(("r", "weight_lr_power"), (-_INF, _INF, True, True)),
    "schedule_free_beta": (0, 1, True, True),
}

ENDS = ("hyperball", "schedule_free", "schedule_free_beta")  # options that a recipe with a `tail` or `steps` has not

RECIPES: dict[str, Callable[..., Transform]] = {}  # the first of each name, in the order of their definitions


class Common(TypedDict, total=False):
    """Options that every recipe takes by keyword, where its own signature does not name them: see `around`."""

    weight_decay: Number
    warmup_steps: int
    storage_dtype: str
    mars: bool
    caution: bool
    mars_gamma: float | Tensor
    gradient_clipping: Clipping
    update_clipping: Clipping
    palm: bool
    beta2_scale: float | Tensor
    caution_scaling: bool
    max_grad_norm: float | Tensor | None
    decay: str
    lr_peak: float | Tensor | None
    decay_mask: Mask
    cautious_weight_decay: bool
    hyperball: bool
    schedule_free: bool
    schedule_free_beta: float | Tensor | None
    seed: int | Tensor


def around(
    name: str,
    rule: Callable[..., Transform],
    *,
    lr: Number,
    betas: Betas | None = None,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    palm: bool = False,
    beta2_scale: float | Tensor = 0.8,
    caution_scaling: bool = True,
    max_grad_norm: float | Tensor | None = None,
    decay: str = "coupled",
    lr_peak: float | Tensor | None = None,
    decay_mask: Mask = None,
    cautious_weight_decay: bool = False,
    hyperball: bool = False,
    schedule_free: bool = False,
    schedule_free_beta: float | Tensor | None = None,
    seed: int | Tensor = 0,
    tail: Callable[..., Transform] | None = None,
    steps: bool = False,
    keeps_signs: bool = False,
    **options: Any,
) -> Transform:
    """The recipe of that name around the rule `rule(**options)`.

    lr: learning rate, a number or a function of the step.
    warmup_steps: above 0, steps over which the rate rises to lr: lr * min(1, t / warmup_steps).
    betas: decays of the first and second moment; in the state, and to the rule, beta1 and beta2.
    weight_decay: decoupled. Where the rule's first step moves nothing, neither does decay.
    decay: how it goes with the learning rate lr_t of the step: "coupled", lr_t * weight_decay; "adamc", that times
        lr_t / lr_peak (Defazio 2025, arXiv 2506.02285); "independent", weight_decay * lr_t / lr_peak, which is as large
        for every lr (Loshchilov & Hutter 2019).
    lr_peak: the largest learning rate of the run; None takes lr before the warmup, or the peak of a schedule with named
        numbers.
    decay_mask: which leaves decay, a function (path, parameter) -> bool such as `no_decay_for_vectors`, or a tree of
        bools; None, all of them.
    cautious_weight_decay: decay only the entries with u * p >= 0 (Chen et al. 2025, arXiv 2510.12402).
    hyperball: parameters of two and more dims keep the norm they began with, and lr is the sine of a step's largest
        angle; they do not decay. See the transform `hyperball`.
    schedule_free: the steps move a sequence z, and the parameters are between it and its average, at which a model is
        evaluated: `schedule_free_eval_params`, or `eval()` of a class (Defazio et al. 2024, arXiv 2405.15682).
    schedule_free_beta: how close to the average they are, in (0, 1); None is 0.9.
    max_grad_norm: the gradients of all leaves together are shrunk to this norm, see `clip_by_global_norm`; None does
        not. It comes behind MARS and before all else.
    storage_dtype: of what is kept: "float32" (float64 for float64 parameters), "bfloat16", stochastically rounded, or
        "float64".
    mars, mars_gamma: variance-reduced gradients. caution: drop the updates that go against the gradient;
        caution_scaling=False does not rescale the others.
    gradient_clipping, update_clipping: a documented name, a pure function of a list of tensors, a Transform, or None.
    palm, beta2_scale: beta2 = 1 - t^(-beta2_scale), where palm is True.
    eps: among the `options`, the least that a rule divides by, max(sqrt(v), eps).
    seed: of the random draws (an int, or an integer tensor under vmap); the key is in the state.
    tail: what turns the rule's updates into steps, given the warmed-up lr and the rule's arguments; by default
        `scale_by_learning_rate(lr)`.
    steps: the rule makes steps itself: `rule(lr, behind, **options)` is given the warmed-up lr and what comes between
        it and the step, a Transform of directions that ends with weight decay.
    keeps_signs: the rule divides the gradient by positive numbers, so that `caution` drops nothing; it warns, unless
        MARS or a clipping function of the user's may change signs.
    options: what else the rule takes, by its names. Numbers with a known range (`RANGES`) become hyperparameters, and
        floats and 0-dim tensors whatever their names.

    Raises ValueError for a number outside its range, TypeError for a flag that is no bool.
    """
    check_flags(mars=mars, caution=caution, palm=palm, caution_scaling=caution_scaling)
    check_flags(cautious_weight_decay=cautious_weight_decay, hyperball=hyperball, schedule_free=schedule_free)
    check_decay(name, decay, lr, lr_peak, steps)
    check_end(name, hyperball, schedule_free, schedule_free_beta, steps or tail is not None)
    decay_mask = outside_of_spheres(decay_mask) if hyperball else decay_mask
    named = all(clip is None or isinstance(clip, str) for clip in (gradient_clipping, update_clipping))
    if keeps_signs and caution is True and mars is False and named:
        warnings.warn(
            f"caution=True has no effect in {name}, whose updates have the signs of the gradient: leave it out",
            stacklevel=5,
        )
    numbers: dict[str, Any] = {"lr": lr}
    if betas is not None:
        numbers |= split_betas(betas)
    elif palm:
        raise TypeError(f"palm={short(palm)}: {name} has no second moment, expected False")
    numbers |= {k: v for k, v in options.items() if (k in RANGES and v is not None) or isinstance(v, float)}
    numbers |= {"weight_decay": weight_decay, "mars_gamma": mars_gamma}
    numbers |= {k: v for k, v in {"max_grad_norm": max_grad_norm, "lr_peak": lr_peak}.items() if v is not None}
    if betas is not None:
        numbers["beta2_scale"] = beta2_scale
    if schedule_free:
        numbers["schedule_free_beta"] = 0.9 if schedule_free_beta is None else schedule_free_beta
    numbers = {k: number(k, v) for k, v in numbers.items()} | {
        k: v for k, v in options.items() if isinstance(v, Tensor)
    }
    choices = {k: v for k, v in options.items() if k not in numbers}

    def whole(
        lr: Number,
        weight_decay: Number,
        mars_gamma: Any,
        beta2_scale: Any = None,
        max_grad_norm: Any = None,
        lr_peak: Any = None,
        schedule_free_beta: Any = None,
        **more: Any,
    ) -> Transform:
        more = {**choices, **more}
        momentum = more.get("beta1", more.get("beta", more.get("momentum")))
        if palm:
            more["beta2"] = palm_beta2(beta2_scale)
        rate, behind = warmup(lr, warmup_steps), after(update_clipping, caution, caution_scaling)
        if decay != "coupled":
            weight_decay = per_peak(weight_decay, rate if decay == "adamc" else 1.0, peak_of(lr, lr_peak))
        if steps:
            inside = chain(*behind, add_decayed_weights(weight_decay, decay_mask, cautious_weight_decay), name="behind")
            middle = [rule(rate, inside, **more)]
        else:
            scaled = rule(**more)
            amount = weight_decay if scaled.first_step_moves else after_first(weight_decay)
            shrink = add_decayed_weights(amount, decay_mask, cautious_weight_decay)
            if tail is not None:
                end = tail(rate, **more)
            elif schedule_free:
                end = schedule_free_(rate, schedule_free_beta)
            else:
                end = (hyperball_ if hyperball else scale_by_learning_rate)(rate)
            middle = [scaled, *behind, shrink, end]
        return with_storage(
            chain(
                *before(mars, mars_gamma, momentum, gradient_clipping, max_grad_norm),
                *middle,
                round_to_parameters(seed),
                name=name,
            ),
            storage_dtype,
            seed,
        )

    return with_hyperparameters(whole, **numbers)


def before(
    mars: bool, mars_gamma: Any, beta1: Any, gradient_clipping: Clipping, max_grad_norm: Any = None
) -> list[Transform]:
    """What comes between the raw gradient and the rule."""
    if mars and (callable(beta1) or beta1 is None):
        raise TypeError(f"beta1={short(beta1)}: MARS needs a number, not a schedule")
    clip = [] if max_grad_norm is None else [clip_by_global_norm(max_grad_norm)]
    clip += [clip_by(gradient_clipping, "gradient_clipping")] if gradient_clipping is not None else []
    return [mars_correction(mars_gamma, beta1), *clip] if mars else clip


def after(update_clipping: Clipping, caution: bool, caution_scaling: bool) -> list[Transform]:
    """What comes between the rule and the parameters."""
    clip = [clip_by(update_clipping, "update_clipping")] if update_clipping is not None else []
    return [*clip, caution_(caution_scaling)] if caution else clip


# Signatures: written once, and known to whoever derives something from a recipe.


def recipe(fn: Callable[..., Transform] | None = None, *, without: Collection[str] = ()) -> Any:
    """Register a recipe. Behind its `**common`, its signature shows the options of `around` but those in `without`."""
    if fn is None:
        return functools.partial(recipe, without=without)
    own = inspect.signature(fn).parameters
    shared = inspect.signature(around).parameters
    names = [name for name in Common.__annotations__ if name not in (*own, *without)]
    more = [shared[name] for name in names] if any(p.kind is p.VAR_KEYWORD for p in own.values()) else []
    return _registered(fn, [*own.values(), *more])


def like(
    other: Callable[..., Transform], *, without: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., Transform]], Any]:
    """Register a recipe that has the arguments of another, in its order, and takes them by keyword.

    without: those that it does not have.
    defaults: values that differ from the other's. Arguments of its own come behind the others.

        @like(adamw)
        def laprop(**options):
            return around("laprop", scale_by_laprop, **options)
    """

    def decorate(fn: Callable[..., Transform]) -> Callable[..., Transform]:
        theirs = {k: p for k, p in inspect.signature(other).parameters.items() if k not in without}
        changed = [p.replace(default=defaults.get(p.name, p.default)) for p in theirs.values()]
        return _registered(fn, [*changed, *(p for n, p in inspect.signature(fn).parameters.items() if n not in theirs)])

    return decorate


def _registered(fn: Callable[..., Transform], listed: Sequence[inspect.Parameter]) -> Callable[..., Transform]:
    """`fn`, called by keyword, as a recipe with these arguments."""
    signature = inspect.Signature(sorted([p for p in listed if p.kind is not p.VAR_KEYWORD], key=lambda p: p.kind))
    values = {p.name: p.default for p in signature.parameters.values()}
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @remembered
    @functools.wraps(fn)
    def wrapper(*args: Any, **options: Any) -> Transform:
        given = {**dict(zip(positional, args, strict=False)), **options}
        if len(args) > len(positional) or len(given) < len(args) + len(options):
            raise TypeError(f"{fn.__name__}: expected at most {len(positional)} arguments in place, and each only once")
        for name in [n for n in options if n not in values]:
            hint = meant(name, values)
            raise TypeError(f"{fn.__name__}: unknown option {name!r}{hint}, expected one of {', '.join(values)}")
        for name, value in given.items():  # doubt=1 is the number that doubt=1.0 is
            if type(value) is int and type(values[name]) is float and name not in RANGES:
                given[name] = float(value)
        return fn(**{**values, **given})

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    if same_source(RECIPES.get(fn.__name__, fn), fn):
        RECIPES[fn.__name__] = wrapper
    return wrapper


def same_source(one: Any, other: Any) -> bool:
    """Whether two functions or classes are one definition, perhaps of a module that was loaded again: a stranger's of
    the same name is registered beside nothing, and replaces nothing."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


# What the numbers and flags of recipes may be.


def split_betas(betas: Any, n: int = 2) -> dict[str, Any]:
    """beta1, beta2, ... of the `n` betas. Raises ValueError for what is not that many."""
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != n:
        raise ValueError(f"betas={short(betas)}: expected {('one', 'two', 'three')[n - 1]} numbers")
    return {f"beta{i}": beta for i, beta in enumerate(betas, 1)}


def number(name: str, value: Any) -> Any:
    """A hyperparameter, checked. Ints become floats: weight_decay=0 is a number of the state and not a choice."""
    if callable(value) and name not in SCHEDULES:
        raise TypeError(f"{name}={short(value)}: expected a number; schedules are for {', '.join(SCHEDULES)}")
    check_value(name, value)
    return float(value) if isinstance(value, int) else value


def check_value(name: str, value: Any) -> None:
    """Raise ValueError or TypeError unless `value` may be the hyperparameter of that name: its range is known, or else
    is the finite numbers. Functions, and the values of tensors, are not looked at; of a schedule with named numbers,
    "lr.peak", say, has the range of "lr"."""
    if isinstance(value, ParametricSchedule):
        for k, v in value.numbers.items():
            check_value(f"{name}.{k}", v)
        return
    of, _, last = name.partition(".")
    if last and of in SCHEDULES:
        check_schedule_number(name, value)
        if not is_schedule_value(name):
            return
        low, high, open_low, open_high = RANGES[of]
        check_number(name, value, low, high, open_low=open_low, open_high=open_high)
        return
    low, high, open_low, open_high = RANGES.get(name, (-_INF, _INF, True, True))
    check_number(name, value, low, high, open_low=open_low, open_high=open_high)


def check_decay(name: str, decay: Any, lr: Number, lr_peak: Any, finds_rate: bool) -> None:
    """Raise ValueError for an unknown `decay`, and TypeError where a recipe cannot have it."""
    check_choice("decay", decay, ("coupled", "adamc", "independent"))
    if decay == "coupled":
        if lr_peak is not None:
            raise TypeError(f"lr_peak={short(lr_peak)} has no effect with decay='coupled': leave it out")
    elif callable(lr) and not isinstance(lr, ParametricSchedule) and lr_peak is None:
        raise TypeError(f"decay={decay!r}, lr={short(lr)}: nobody knows the peak of a function, expected lr_peak too")
    if decay == "independent" and finds_rate:
        raise TypeError(f"decay='independent' in {name}, which finds its learning rate: expected 'coupled' or 'adamc'")


def check_end(name: str, hyperball: bool, schedule_free: bool, beta: Any, has_one: bool) -> None:
    """Raise TypeError where a step cannot end as said, and for a `schedule_free_beta` that has no effect."""
    for option in [k for k, on in {"hyperball": hyperball, "schedule_free": schedule_free}.items() if on and has_one]:
        raise TypeError(f"{option}=True in {name}, which makes steps in a way of its own: expected False")
    if hyperball and schedule_free:
        raise TypeError("hyperball=True and schedule_free=True: an average is on no sphere, expected one of them")
    if beta is not None and not schedule_free:
        raise TypeError(f"schedule_free_beta={short(beta)} has no effect with schedule_free=False: leave it out")


def peak_of(lr: Number, lr_peak: float | Tensor | None) -> float | Tensor:
    """The largest learning rate: what is given, or that of a number or a schedule with named numbers."""
    found: Any = lr if lr_peak is None else lr_peak
    return found.peak if isinstance(found, ParametricSchedule) else found


def check_flags(**flags: Any) -> None:
    """Raise TypeError for what is no bool: "False", say, would mean True. Tensors are not looked at."""
    for name, value in flags.items():
        if not isinstance(value, (bool, Tensor)):
            raise TypeError(f"{name}={short(value)}: expected True or False")
