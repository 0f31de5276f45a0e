"""The contract: a rule is a pair of pure functions over a tree of parameters.

    init(params) -> state
    update(state, grads, params) -> (updates, new_state)        params = apply_updates(params, updates)

The state is nested dicts of tensors, so it saves, shards, stacks and maps like any other data:

    tx = chain(scale_by_adam(0.9, 0.99), scale_by_learning_rate(1e-3))
    state = tx.init(params)
    updates, state = tx.update(state, grads, params)
    params = apply_updates(params, updates)

Users may hold parameters in any nesting of containers. The outermost transform flattens once: every tree inside is
a flat dict from path to tensor (`Leaves`), for instance "layer.0.weight", and a gradient that is None is a missing key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from hbfunc.autocast import as_around, in_own_precision, kinds_of
from hbfunc.forms import short
from hbfunc.leaves import (
    NOTHING,
    Flat,
    Layout,
    Leaves,
    State,
    Tree,
    compute_dtype,
    flat_like,
    flat_params,
    flatten,
    real_params,
)
from hbfunc.ranges import plain
from hbfunc.tree import apart, misfit, same_form, select_leaves, tensors

RefreshSchedule = Callable[[int], "bool | str | None"]  # step t, from 1 -> what `update(..., refresh=)` is given there


class Made:
    """How a Transform was made: the function, its arguments, and what it returned."""

    def __init__(
        self, function: Callable[..., Transform], args: tuple[Any, ...], kwargs: dict[str, Any], first: Transform
    ) -> None:
        self.function, self.args, self.kwargs, self.first = function, args, kwargs, first


class Flush(NamedTuple):
    """The extra "flush" of a call that ends a window of `accumulate`, and may not count as one of its calls itself."""

    ends: bool | Tensor | None  # whether gradients that are being gathered are applied now
    counts: int | Tensor = 1  # 0 where nothing has a gradient now


class Transform(NamedTuple):
    """A gradient transformation.

    init: params -> state, a dict complete from the start: its keys, shapes and dtypes never change.
    update: (state, grads, params, **extras) -> (updates, new_state), pure; updates are added to the parameters. What
        the outermost transform returns shares no dict and no tensor with what it was given.
    name: key of its state inside a chain.
    needs: extras it asks the chain for: "grads" (the raw gradients), "refresh" (None, True, False or "first": whether
        expensive statistics are refreshed now; None decides in the graph), "curvature" (v -> Hessian-vector product),
        "steps" (paths of the leaves whose updates are steps already, see below), "last" (False where something behind
        may change its updates), "flush" (whether gradients that are being gathered are applied now, or a `Flush`; see
        `accumulate`), "present" (by path, 0-dim bools: which updates are real, and not zeros in place of a missing
        one; or None, all are), "rate" (a factor of the learning rates inside that are no hyperparameters of the state,
        or None), "total" (from sums of squares by path to the sum over all leaves that are stepped together, here and
        elsewhere; or None, these are all), "decays" (paths of the leaves that weight decay is for; or None, the field
        below says it), "value" (the loss of this step, a 0-dim tensor).
    layout: which rows of a stacked state tensor belong to which parameter: params -> nested dict, shaped like the state
        down to the stacks, of tuples of paths (one per row). None: the state has no stacks.
    elementwise: in float32 and float64, an entry of an update depends on no other entry, nor on where it is or what its
        leaf is called. So leaves with equal counts may be cut, joined and sharded, and give the same numbers; and a
        complex leaf is one of real numbers, as in torch.optim.
    leafwise: an update of a leaf depends on no other leaf, so that each may be computed on another machine. All that is
        elementwise is leafwise. Both hold but for the extras "total" and "decays": who cuts, joins or parts leaves has
        to give them.
    refreshes: what `refresh=None` decides, known outside of the graph: state -> schedule, a function of a leaf's own
        step t. Of the state it reads keys and hyperparameters only, which may be CPU copies or Python numbers. None,
        or a schedule of None: nobody knows it but the graph.
    refreshed: what refresh=True does beyond refresh=False where each leaf has a gradient: a function of the state that
        the latter returns, so that a step needs no graph of its own for it. None: they are not to be parted.
    first_step_moves: whether the first step moves parameters; False for rules that gather statistics in it.
    steps: whether it makes directions, which are to be subtracted, into steps, which are to be added: a learning rate
        with its minus sign does. True, False, or a function of params that gives the paths of the leaves of which it
        does. What it is given as steps it hands on as steps.
    rounding: makes a transform that rounds its updates for low-precision parameters, if it ends in one: `chain` puts
        one behind whatever follows, and this one, which is told by "last", leaves it to that.
    every_call: `update` counts its calls or follows the parameters: it is to be called at every step, also when no leaf
        has a gradient, and may then move leaves that had one before.
    decays: which leaves weight decay is for, a function (path, parameter) -> bool; None, all are.
    made: how it was made, which is what pickle stores in place of functions inside of functions; see `remembered`.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[Tree, State]]
    name: str
    needs: tuple[str, ...] = ()
    layout: Callable[[Flat], Layout] | None = None
    elementwise: bool = False
    leafwise: bool = False
    refreshes: Callable[[State], RefreshSchedule | None] | None = None
    refreshed: Callable[[State], State] | None = None
    first_step_moves: bool = True
    steps: bool | Callable[[Flat], Collection[str]] = False
    rounding: Callable[[], Transform] | None = None
    every_call: bool = False
    decays: Callable[[str, Tensor], bool] | None = None
    made: Made | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.made is None:
            return Transform, tuple(self)
        fields = zip(self._fields, self, self.made.first, strict=True)
        changes = {name: new for name, new, old in fields if new is not old and name != "made"}
        return _made_again, (self.made.function, self.made.args, self.made.kwargs, changes)

    def __copy__(self) -> Transform:
        return self

    def __deepcopy__(self, memo: Any) -> Transform:
        return self  # nobody changes it


P = ParamSpec("P")


def remembered(factory: Callable[P, Transform]) -> Callable[P, Transform]:
    """A factory whose transforms pickle as the call that made them: the factory by its name, and the arguments, which
    must pickle themselves, as functions of a module do and lambdas do not. It takes numpy's numbers for Python's."""

    call = cast(Callable[..., Transform], factory)

    @functools.wraps(factory)
    def make(*given: P.args, **options: P.kwargs) -> Transform:
        if torch.compiler.is_compiling():
            return factory(*given, **options)
        args, kwargs = tuple([plain(x) for x in given]), {k: plain(x) for k, x in options.items()}
        made = call(*args, **kwargs)
        if any(made is x for x in args):
            return made
        return made._replace(made=Made(make, args, kwargs, made))

    return make


def _made_again(
    function: Callable[..., Transform], args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str, Any]
) -> Transform:
    return function(*args, **kwargs)._replace(**changes)


def own_code(fn: Any, name: str) -> Any:
    """`fn`, a function made inside of another, which now has a code object of its own, of this name.

    torch.compile counts its (few) permitted recompilations per code object: the tenth optimizer that a process compiles
    would fail for the first nine.
    """
    fn.__code__ = fn.__code__.replace(co_name=name)
    return fn


def by_device(update: Callable[..., tuple[dict[str, Tensor], State]]) -> Callable[..., tuple[dict[str, Tensor], State]]:
    """An update that is given leaves on several devices, from one for those of one device. For rules in which a leaf
    knows nothing of the others; "key" in the state is for all of them."""

    def one_by_one(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        devices = dict.fromkeys([u.device for u in updates.values()])
        if len(devices) < 2:
            return update(state, updates, params, **extras)
        moved: dict[str, Tensor] = {}
        shared = {"key": state["key"]} if "key" in state else {}
        for device in devices:
            local = {k: u for k, u in updates.items() if u.device == device}
            new, state = update({**state, **{k: x.to(device) for k, x in shared.items()}}, local, params, **extras)
            moved |= new
        return {k: moved[k] for k in updates}, {**state, **shared}

    return one_by_one


@remembered
def transform(
    init: Callable[[Leaves], State],
    update: Callable[..., tuple[dict[str, Tensor], State]],
    name: str,
    needs: tuple[str, ...] = (),
    layout: Callable[[Flat], Layout] | None = None,
    elementwise: bool = False,
    leafwise: bool = False,
    steps: bool | Callable[[Flat], Collection[str]] = False,
    rounding: Callable[[], Transform] | None = None,
) -> Transform:
    """A Transform over any tree, from functions over `Leaves`. Inside a chain, where trees are flat, it is free."""

    def init_tree(params: Tree) -> State:
        if isinstance(params, Leaves):
            return init(params)
        flat = flat_params(params, elementwise)[0]
        return in_own_precision(lambda: init(flat), kinds_of(flat.values()))

    def update_tree(state: State, grads: Tree, params: Tree, /, **extras: Any) -> tuple[Tree, State]:
        if isinstance(params, Leaves):
            if "grads" in needs and extras.get("grads") is None:
                extras["grads"] = grads
            return update(state, grads, params, **extras)
        flat, back, pairs = real_params(params, elementwise)
        kinds = kinds_of(flat.values())
        try:
            given = flat_like(flat, grads, "grads", pairs)
        except (TypeError, ValueError) as error:
            if _is_like(flat, state):
                raise TypeError(_ORDER) from error
            raise
        if extras.get("grads") is not None:
            extras["grads"] = flat_like(flat, extras["grads"], "grads", pairs)
        elif "grads" in needs:
            extras["grads"] = given  # outermost, what it is given are the raw gradients
        ends = extras.get("flush")
        if isinstance(ends, (bool, Tensor)) and not given:  # it ends a window, and does not count as a call
            extras["flush"] = Flush(ends, 1 - ends.to(torch.int64) if isinstance(ends, Tensor) else int(not ends))
        if extras.get("curvature") is not None:
            product = as_around(extras["curvature"], kinds)
            extras["curvature"] = lambda v: flat_like(flat, product(back(v)), "curvature(v)", pairs)
        try:
            updates, new = in_own_precision(lambda: update(state, given, flat, **extras), kinds)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            amiss = misfit(state, init(flat), None if layout is None else layout(flat))
            if amiss is None:
                raise
            raise ValueError(amiss) from error
        if not same_form(state, new) or any(u.shape != flat[k].shape for k, u in updates.items()):
            amiss = misfit(state, init(flat), None if layout is None else layout(flat))
            if amiss is not None:
                raise ValueError(amiss)
        taken = dict.fromkeys([*tensors(state), *flat.values(), *given.values(), *(extras.get("grads") or {}).values()])
        return back(apart(updates, taken)), apart(new, taken)

    if not torch.compiler.is_compiling():
        own_code(update_tree, f"{name}_update")
    leafwise = leafwise or elementwise
    return Transform(init_tree, update_tree, name, needs, layout, elementwise, leafwise, steps=steps, rounding=rounding)


def wrap(
    inner: Transform,
    init: Callable[[Leaves], State],
    update: Callable[..., tuple[dict[str, Tensor], State]],
    *,
    inside: str = "inner",
    **changes: Any,
) -> Transform:
    """A Transform around another: all that is true of `inner` stays true, but for `refreshed` and what is in `changes`.

    inside: the key of inner's state in that of the new one, "" where they are the same dict.
    """
    fields: dict[str, Any] = dict(zip(inner._fields, inner, strict=True))
    layout, refreshes = inner.layout, inner.refreshes
    if inside and layout is not None:
        fields["layout"] = lambda params: {inside: layout(params)}
    if inside and refreshes is not None:
        fields["refreshes"] = lambda state: refreshes(state[inside])
    fields |= {"made": None, "refreshed": None, **changes}
    outer = transform(init, update, *(fields[k] for k in ("name", "needs", "layout", "elementwise")))
    return Transform(**{**fields, "init": outer.init, "update": outer.update})


def agreed(schedules: Sequence[RefreshSchedule | None]) -> RefreshSchedule | None:
    """One schedule for several transforms: what they all say, and None, which lets the graph decide, where they differ
    or one is not known."""
    if len(schedules) == 1 or None in schedules:
        return schedules[0] if len(schedules) == 1 else None

    def schedule(t: int) -> bool | str | None:
        said = {s(t) for s in schedules if s is not None}
        return said.pop() if len(said) == 1 else None

    return schedule


_ORDER = (
    "update got gradients where the state is expected: the order is tx.update(state, grads, params), "
    "not Optax's tx.update(grads, state, params)"
)


def _is_like(params: Leaves, tree: Any) -> bool:
    """Whether a tree has the leaves of the parameters."""
    return set(params) <= set(flatten(tree)[0])


@remembered
def chain(*transforms: Transform, name: str = "chain") -> Transform:
    """Feed each transform's updates to the next. The state is a dict keyed by their names (a second one gets "_2").

    A chain is itself a Transform. It tells its transforms which updates are steps already, so that caution, weight
    decay and a second learning rate do the right thing behind the first, and sees to it that bfloat16 parameters are
    rounded last. Raises TypeError for an argument that is not a Transform.
    """
    for t in transforms:
        if not isinstance(t, Transform):
            raise TypeError(
                f"chain expects transforms, got {short(t)}: call the factory, as in chain(scale_by_adam(), ...)"
            )
    rounding = [t.rounding for t in transforms if t.rounding is not None]
    if any(t.rounding is not None for t in transforms[:-1]):
        transforms = (*transforms, rounding[-1]())
    return _chain(transforms, name)


def parallel(*transforms: Transform, name: str) -> Transform:
    """A chain of transforms of which each has leaves of its own, so that what one makes of them is final."""
    return _chain(transforms, name, parallel=True)


def _chain(transforms: Sequence[Transform], name: str, parallel: bool = False) -> Transform:
    names = _unique([t.name for t in transforms])
    # What is told of one sum of squares, or one choice of leaves, is not true of another's.
    twice = {need for need in ("total", "decays") if sum(need in t.needs for t in transforms) > 1}
    needs = tuple(sorted({need for t in transforms for need in t.needs} - twice))
    asked = [any("steps" in t.needs for t in transforms[i:]) for i in range(1, len(transforms) + 1)]  # by those behind

    def init(params: Leaves) -> State:
        states = {n: t.init(params) for n, t in zip(names, transforms, strict=True)}
        return {n: s for n, s in states.items() if s}

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        grads: dict[str, Tensor] | None = None,
        refresh: bool | str | None = None,
        curvature: Callable[[Tree], Tree] | None = None,
        steps: Collection[str] = (),
        last: bool = True,
        flush: Flush | bool | Tensor | None = None,
        present: Flat | None = None,
        rate: Tensor | None = None,
        total: Callable[[Flat], Tensor] | None = None,
        decays: Collection[str] | None = None,
        value: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        extras: dict[str, Any] = {"grads": updates if grads is None else grads, "refresh": refresh}
        extras |= {"curvature": curvature, "steps": steps, "flush": flush, "rate": rate, "value": value}
        extras |= {"total": None if "total" in twice else total, "decays": None if "decays" in twice else decays}
        new = {}
        for i, (n, t) in enumerate(zip(names, transforms, strict=True)):
            extras["last"] = last and (parallel or i == len(transforms) - 1)
            asked_for, before = {need: extras[need] for need in t.needs if need != "present"}, state.get(n, {})
            if present is None:
                updates, s = t.update(before, updates, params, **asked_for)
            else:
                updates, s = update_present(t, before, updates, params, present, asked_for)
                present = None if t.every_call and not parallel else present  # every leaf has an update behind it
            if s:
                new[n] = s
            if t.steps is not False and asked[i]:
                extras["steps"] = {*extras["steps"], *made_steps(t, params)}
        return updates, new

    def layout(params: Flat) -> Layout:
        return {n: t.layout(params) for n, t in zip(names, transforms, strict=True) if t.layout is not None}

    due = {n: (t.refreshes, t.refreshed) for n, t in zip(names, transforms, strict=True) if "refresh" in t.needs}

    def refreshes(state: State) -> RefreshSchedule | None:
        return agreed([None if r is None else r(state.get(n, {})) for n, (r, _) in due.items()])

    def refreshed(state: State) -> State:
        return {n: s if (after := due.get(n, (None, None))[1]) is None else after(s) for n, s in state.items()}

    elementwise = all(t.elementwise for t in transforms) and not twice
    leafwise = all(t.leafwise for t in transforms) and "total" not in twice
    stacked = any(t.layout is not None for t in transforms)  # torch 2.11 traces no truth of functions
    rounding = next((t.rounding for t in reversed(transforms) if t.rounding is not None), None)
    return transform(init, update, name, needs, layout if stacked else None, elementwise, leafwise)._replace(
        refreshes=refreshes if due else None,
        refreshed=refreshed if due and all(after is not None for _, after in due.values()) else None,
        first_step_moves=all(t.first_step_moves for t in transforms),
        steps=_any_steps(transforms),
        rounding=rounding,
        every_call=any(t.every_call for t in transforms),
        decays=None if twice else next((t.decays for t in transforms if t.decays is not None), None),
    )


def made_steps(t: Transform, params: Flat) -> Collection[str]:
    """Paths of the leaves whose updates a transform makes into steps."""
    return t.steps(params) if callable(t.steps) else params.keys() if t.steps else ()


def _any_steps(transforms: Sequence[Transform]) -> bool | Callable[[Flat], Collection[str]]:
    """`Transform.steps` of several, one after the other."""
    if any(t.steps is True for t in transforms):
        return True
    some = [t for t in transforms if t.steps is not False]
    return (lambda params: {k for t in some for k in made_steps(t, params)}) if some else False


def _unique(names: list[str]) -> list[str]:
    return [n if names[:i].count(n) == 0 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names)]


@remembered
def stateless(name: str, fn: Callable[[Tensor], Tensor], elementwise: bool = False) -> Transform:
    """The transform that maps every leaf of the updates by `fn` and keeps nothing."""

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        return {k: fn(u) for k, u in updates.items()}, {}

    return transform(lambda params: {}, update, name, elementwise=elementwise, leafwise=True)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf, summed in float32 (float64 for float64) and kept in the dtype of the parameters.

    A leaf whose update is None stays as it is, the same tensor. Nothing is detached, so that one can differentiate
    through a training: parameters that require grad keep a record of it. Raises ValueError naming the first path at
    which the trees differ.
    """
    flat, back, pairs = real_params(params, elementwise=True)
    added = flat_like(flat, updates, "updates", pairs)
    return back({k: (p.to(compute_dtype(p)) + added[k]).to(p.dtype) if k in added else p for k, p in flat.items()})


def update_present(
    inner: Transform, state: State, updates: Mapping[str, Tensor], params: Leaves, present: Flat, extras: dict[str, Any]
) -> tuple[dict[str, Tensor], State]:
    """inner.update for updates of which some stand for a missing gradient: zeros, where `present` (0-dim bools by path)
    is False. Their leaves stay as they are, unless `inner` decides itself (`Transform.every_call`)."""
    if inner.every_call:
        return inner.update(state, updates, params, present=present, **extras)
    new, after = inner.update(state, updates, params, **extras)
    layout = {} if inner.layout is None else inner.layout(params)
    own = {k for k, u in new.items() if u is not updates[k]}  # a part of a partition hands the others' on
    moved = {k: torch.where(present[k], u, NOTHING) if k in own else u for k, u in new.items()}
    return moved, select_leaves(present, after, state, layout)
