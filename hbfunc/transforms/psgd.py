"""PSGD-Kron and PSGD-PRO: a Kronecker-factored preconditioner, learned online without inverting a covariance.

P = kron(Q_0^T Q_0, Q_1^T Q_1, ...), with triangular or diagonal Q, is fitted to minimise E[g^T P g + v^T P^-1 v] over
gradients g and probes v ~ N(0, I), so that P whitens gradients: P -> E[g g^T]^(-1/2). With h = H v in place of g it is
Newton's: P -> |H|^(-1). Li 2015, arXiv 1512.04202; Pooladzandi and Li 2024, arXiv 2402.04553.

PSGD-PRO has dense Q in the place of triangles, and fits them without P^-1 and without v (Li 2024, arXiv 2402.11858, and
his psgd_torch).

The factors are stacked by shape, and fitted on some steps only. All randomness is keyed. With k the key in the state
and t a leaf's own count, from 1,

    words = fold_in_each(k, t, "schedule") / 2^32                 shared by all leaves of count t
    due = words[0] < probability(t)
    balanced = words[1] < 0.01
    v = normal(fold_in_each(k, t, f"{path}/probe"), leaf.shape, dtype)

so what is drawn for a leaf does not depend on the other leaves. The same v damps what the factors are fitted on, as in
Li's own code: E of the fit does not change, and with a curvature it makes h = (H + a small multiple of I) v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hbfunc import buckets, random
from hbfunc.branch import branch
from hbfunc.buckets import Bucket
from hbfunc.contract import Transform, remembered
from hbfunc.forms import short
from hbfunc.leaves import Flat, Layout, Leaves, State, compute_dtype, kept, scalar
from hbfunc.opaque import materialize
from hbfunc.precision import STORAGE
from hbfunc.ranges import check_choice, check_int, check_number
from hbfunc.schedules import Number, at, count_zeros, increment
from hbfunc.stacks import layout as stacks_layout
from hbfunc.stacks import matrix_rule, put, take, where
from hbfunc.transforms.psgd_factors import Factors

Curvature = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

_BALANCED = 0.01
_REACHED = 1 - 1e-9  # a sum of probabilities this close to the next integer has reached it: ten times 0.1 is 1


@remembered
def scale_by_psgd(
    precond_lr: float | Tensor = 0.1,
    precond_init_scale: float | Tensor = 1.0,
    preconditioner_update_probability: Number | None = None,
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    merge_dims: bool = False,
    split: bool = False,
    store_triu_as_line: bool = True,
    q_dtype: str = "float32",
    stochastic_schedule: bool = True,
    delayed: bool = False,
    cached: bool = False,
    *,
    curvature: bool = False,
    pro: bool = False,
    seed: int | Tensor = 0,
) -> Transform:
    """Precondition the updates by PSGD-Kron: u -> P u, P = kron(Q_0^T Q_0, Q_1^T Q_1, ...), one Q per dim.

    On some steps the factors are fitted, `hbfunc.linalg.kron.fit`, before they are applied.

    pro: PSGD-PRO. The factors are dense where they would be triangular, nearly symmetric, and fitted by products
        alone: `hbfunc.linalg.kron.fit_dense`.

    precond_lr: step size of the fit, at least 0.
    precond_init_scale: scale of the root of P at first, above 0: each Q starts at scale^(1/ndim) I.
    preconditioner_update_probability: probability of a fit at a step, in [0, 1]: a number, or a function of t. None is
        `update_probability`.
    max_size_triangular, min_ndim_triangular: dims that are larger or of size 1, and all dims of parameters with fewer
        dims, get a diagonal Q; the others a triangular one.
    memory_save_mode: "one_diag" makes the Q of the largest dim (of equals, the last) diagonal too, "all_diag" all.
    momentum_into_precond_update: fit on the updates that come in; False fits on `grads`, the gradients that the chain
        was given.
    merge_dims: multiply neighbouring dims together as long as the product is at most max_size_triangular.
    split: cut dims that are larger than max_size_triangular into blocks of that size.
    store_triu_as_line: keep triangles as vectors: half the memory, the same numbers.
    q_dtype: dtype in which the factors are kept: "float32" (float64 for float64 parameters), "float64", or "bfloat16",
        to which they are rounded stochastically.
    stochastic_schedule: draw from the key whether to fit; False fits when the sum of the probabilities up to t passes
        an integer.
    delayed: apply the factors as they were before this step's fit.
    cached: keep Q^T Q too, which halves the work of a step without a fit.
    seed: of the key in the state, from which probes and schedule are drawn.
    curvature: fit on h = H v, where v -> H v is given to `update` by keyword, a function of a tree like the parameters:

        hvp = lambda v: torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]
        updates, state = tx.update(state, grads, params, curvature=hvp)

    `update(..., refresh=)`: None decides in the graph, leaf by leaf. True fits all factors and False none, for callers
    who know the step (see `refresh_schedule`): same numbers, and under `torch.vmap`, where None computes a fit at every
    step, less work.

    Raises ValueError or TypeError for an argument outside its range, and TypeError for curvature=True or
    store_triu_as_line=False with pro=True; and in `update` ValueError if `curvature` is missing with curvature=True, or
    given without it.
    """
    if pro and curvature:
        raise TypeError("curvature=True with pro=True: expected one of them, dense factors are fitted on gradients")
    if pro and not store_triu_as_line:
        raise TypeError("store_triu_as_line=False with pro=True: nothing is triangular, leave it out")
    newton = curvature  # `update` has an argument of that name
    check_number("precond_lr", precond_lr, 0, float("inf"), open_high=True)
    check_number("precond_init_scale", precond_init_scale, 0, float("inf"), open_low=True, open_high=True)
    if preconditioner_update_probability is None:
        preconditioner_update_probability = update_probability
    check_number("preconditioner_update_probability", preconditioner_update_probability, 0, 1)
    check_int("max_size_triangular", max_size_triangular, 1)
    check_int("min_ndim_triangular", min_ndim_triangular, 0)
    check_choice("memory_save_mode", memory_save_mode, (None, "one_diag", "all_diag"))
    check_choice("q_dtype", q_dtype, tuple(STORAGE))

    def plan(params: Flat) -> dict[str, Factors]:
        """Plan the buckets. Leaves of few dims have their own: all of their factors are diagonal, and a leaf of more
        dims may be merged to the same shape."""
        make = partial(
            buckets.plan,
            merge=partial(buckets.merge_dims, max_dim=max_size_triangular) if merge_dims else None,
            split=max_size_triangular if split else None,
        )
        many = make({k: p for k, p in params.items() if p.ndim >= min_ndim_triangular})
        few = make({k: p for k, p in params.items() if p.ndim < min_ndim_triangular})
        planned = {n: factors(b, params, memory_save_mode) for n, b in many.items()}
        return planned | {f"diagonal_{n}": factors(b, params, "all_diag") for n, b in few.items()}

    def factors(bucket: Bucket, params: Flat, mode: str | None) -> Factors:
        largest = max(range(len(bucket.shape)), key=lambda d: (bucket.shape[d], d))
        diagonal = {None: (), "one_diag": (largest,), "all_diag": range(len(bucket.shape))}[mode]
        triangular = [1 < n <= max_size_triangular and d not in diagonal for d, n in enumerate(bucket.shape)]
        dtype = compute_dtype(params[bucket.paths[0]])
        kept_in = dtype if q_dtype == "float32" else STORAGE[q_dtype]
        return Factors(bucket, tuple(triangular), dtype, store_triu_as_line and not pro, kept_in, cached, pro)

    def init(params: Leaves) -> State:
        state: State = {"count": count_zeros(params)}
        if params:
            state["key"] = random.key(seed, next(iter(params.values())).device)
        if not stochastic_schedule:
            state["progress"] = {k: torch.zeros((), dtype=torch.float64, device=p.device) for k, p in params.items()}
        for n, f in plan(params).items():
            for field, x in zip(f.fields, f.start(precond_init_scale, params[f.bucket.paths[0]].device), strict=True):
                state.setdefault(field, {})[n] = x
        return state

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        grads: dict[str, Tensor],
        refresh: bool | str | None = None,
        curvature: Curvature | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        _check_extras(refresh, curvature, newton)
        count = increment(state["count"], updates)
        planned = plan(params)
        rows = {n: buckets.present(f.bucket, updates) for n, f in planned.items()}
        active = {n: f for n, f in planned.items() if rows[n] != ()}
        if not active:
            return updates, kept(state, count=count)
        paths = [
            path for f in active.values() for path in f.bucket.paths if path in updates
        ]  # one per row of the stacks
        leaves = list(dict.fromkeys(paths))
        t = torch.stack([count[path] for path in paths])
        due, progress = (t > 0, {}) if stochastic_schedule else reached(state, t, paths)
        u = _stacks(active, updates)
        kinds = [(tuple(updates[path].shape), updates[path].dtype) for path in leaves]
        stacked = [(tuple(x.shape), x.dtype) for x in u.values()]
        old = {n: [take(state[field][n], rows[n]) for field in f.fields] for n, f in active.items()}

        def fit(
            key: Tensor, keys: Tensor, lr: Tensor, t: Tensor, due: Tensor, balanced: Tensor, *stacks: Tensor
        ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
            """Fit the factors (with refresh=None, those that are due); stacks: the gradients, then the factors.

            Returns the factors as stored, and the same as matrices (not masked by `due`).
            """
            rest = iter(stacks)
            g = {} if newton else {n: next(rest) for n in active}
            stored = _unflatten(rest, active)
            if split or curvature is not None:
                drawn = _normals(keys, [((1, *shape), dtype) for shape, dtype in kinds])
                v = {path: x.squeeze(0) for path, x in zip(leaves, drawn, strict=True)}
                if curvature is not None:
                    v, h = _products(curvature, v, params)
                    g = _stacks(active, h)
                w = _stacks(active, v)
            else:
                w = dict(zip(active, _normals(keys, stacked), strict=True))
            rows = zip(*[x.split([len(x) for x in w.values()]) for x in (t, due, balanced)], strict=True)
            flat: list[Tensor] = []
            matrices: dict[str, list[Tensor]] = {}
            for (n, f), (t_n, due_n, balanced_n) in zip(active.items(), rows, strict=True):
                qs, sizes = f.fit(stored[n], g[n], w[n], lr, balanced_n)
                qs = f.rounded(qs, key, t_n, updates)
                fitted = [*f.store(qs, balanced_n), *sizes]
                if refresh is None:
                    fitted = [where(due_n, a, b) for a, b in zip(fitted, stored[n], strict=True)]
                flat += fitted
                matrices[n] = [q.to(f.dtype) for q in qs]
            return flat, matrices

        new = old
        at_hand: dict[str, list[Tensor]] = {}
        if refresh is not False:
            words, keys = _draws(state["key"], t, leaves, count)
            if refresh is None and stochastic_schedule:
                due = words[:, 0] < probability(t)
            g = {} if newton else u if momentum_into_precond_update else _stacks(active, grads)
            # Blocks of one leaf are views of it, which a branch does not take.
            stacks = [*(x.clone() if split else x for x in g.values()), *(q for qs in old.values() for q in qs)]
            lr = scalar(precond_lr, torch.float64, t.device)
            balanced = materialize(words[:, 1] < _BALANCED)  # once, and not again for the rows of each stack
            operands = [state["key"], keys, lr, t, due, balanced, *stacks]
            if refresh:
                flat, at_hand = fit(*operands)
                new = _unflatten(flat, active)
            else:
                chosen = branch(due.any(), lambda *x: fit(*x)[0], lambda *x: x[6 + len(g) :], operands)
                new = _unflatten(chosen, active)
        if delayed:
            moved = {n: f.apply(old[n], u[n]) for n, f in active.items()}
        else:
            moved = {n: f.apply(new[n], u[n], at_hand.get(n)) for n, f in active.items()}

        fields: dict[str, dict[str, Tensor]] = {}
        for n, f in active.items():
            for field, x in zip(f.fields, new[n], strict=True):
                fields.setdefault(field, {})[n] = put(state[field][n], rows[n], x)
        bucketed = {n: f.bucket for n, f in active.items()}
        return {**updates, **buckets.unstack(bucketed, moved, updates)}, kept(state, count=count, **progress, **fields)

    def probability(t: Tensor) -> Tensor:
        p = at(preconditioner_update_probability, t.to(torch.float64))
        return scalar(p, torch.float64, t.device)

    def reached(state: State, t: Tensor, paths: list[str]) -> tuple[Tensor, State]:
        """Whether the sum of probabilities passes an integer, by row; and by leaf the sum so far, modulo 1."""
        total = torch.stack([state["progress"][path] for path in paths]) + probability(t).clamp(0, 1)
        due = total >= _REACHED
        rows = (total - due.to(torch.float64)).unbind()
        return due, {"progress": {path: x.clone() for path, x in zip(paths, rows, strict=True)}}

    def layout(params: Flat) -> Layout:
        planned = plan(params)
        return stacks_layout({n: f.bucket for n, f in planned.items()}, lambda n: planned[n].fields)

    def refreshes(state: State) -> Callable[[int], bool] | None:
        p = preconditioner_update_probability
        if not stochastic_schedule or (isinstance(p, Tensor) and p.device.type != "cpu"):
            return None  # only the state has the sum of all earlier probabilities, or the value
        return refresh_schedule(p, seed=seed, key=state.get("key"))

    needs = ("grads", "refresh") if pro else ("grads", "refresh", "curvature")
    reads = () if momentum_into_precond_update else ("grads",)
    return matrix_rule(init, update, "scale_by_psgd", needs, layout, reads=reads, refreshes=refreshes)


def update_probability(t: Tensor) -> Tensor:
    """max(.03, .999^max(t - 1000, 0)): every step at first, while curvature changes, later every 33rd."""
    return torch.clamp(0.999 ** torch.clamp(t - 1000, min=0), min=0.03)


def refresh_schedule(
    preconditioner_update_probability: Any = None,
    stochastic_schedule: bool = True,
    seed: int | Tensor = 0,
    key: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[int], bool]:
    """Make the function of t = 1, 2, ... that says, outside of the graph, whether refresh=None fits at step t.

    For callers whose leaves share their count. The first three arguments and `seed` are options of `scale_by_psgd`;
    `key` is the one in its state (None: the one that `seed` gives), `dtype` float32, or float64 for float64 parameters:
    in it the state holds a probability that is a number. A function of t is called with a 0-dim float64 tensor. A
    deterministic schedule walks through all steps up to t when it is first asked.

        due = refresh_schedule(key=state["psgd"]["scale_by_psgd"]["key"])
        updates, state = tx.update(state, grads, params, refresh=due(t))
    """
    p = update_probability if preconditioner_update_probability is None else preconditioner_update_probability
    constant = 0.0 if callable(p) else float(torch.as_tensor(p, dtype=p.dtype if isinstance(p, Tensor) else dtype))

    def probability(t: int) -> float:
        return float(p(torch.tensor(float(t), dtype=torch.float64, device="cpu"))) if callable(p) else constant

    if stochastic_schedule:
        first, second = (random.key(seed) if key is None else key).tolist()
        return lambda t: _drawn(first, second, t // 1024)[t % 1024] < probability(t)

    last = [(0, 0.0, False)]  # the last step asked for: t, progress, due

    def due(t: int) -> bool:
        n, progress, now = last[0] if last[0][0] <= t else (0, 0.0, False)
        while n < t:
            n += 1
            progress += min(max(probability(n), 0.0), 1.0)
            now = progress >= _REACHED
            progress -= now
        last[0] = (n, progress, now)
        return now

    return due


@lru_cache(maxsize=8)
def _drawn(first: int, second: int, block: int) -> list[float]:
    """The draws of 1024 steps from the key (first, second)."""
    with torch.device("cpu"):
        return _draws(torch.tensor([first, second]), torch.arange(1024) + 1024 * block)[0][:, 0].tolist()


def probe(key: Tensor, t: int, path: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The normal probe v of a leaf at its step t, drawn from the key in the state of `scale_by_psgd`.

    dtype: float32 or float64, that of the computation.
    """
    keys = random.fold_in_each(key, torch.tensor([t], device=key.device), [f"{path}/probe"])
    return random.normal(keys[0], shape, dtype)


def _draws(key: Tensor, t: Tensor, leaves: Sequence[str] = (), count: Flat | None = None) -> tuple[Tensor, Tensor]:
    """Two uniform draws, float64 [n, 2], for each count in t [n]; and the key of v, [m, 2], for each of the leaves."""
    counts = torch.cat([t, torch.stack([count[path] for path in leaves])]) if count else t
    keys = random.fold_in_each(key, counts, ["schedule"] * len(t) + [f"{path}/probe" for path in leaves])
    return keys[: len(t)].to(torch.float64) * 2.0**-32, keys[len(t) :]


def _normals(keys: Tensor, like: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Normal draws, for each shape (k, ...) and dtype in `like` from the next k keys. A compiled graph has one
    generator for all."""
    parts = keys.split([shape[0] for shape, _ in like])
    together: dict[Any, list[int]] = {}
    for i, (_, dtype) in enumerate(like):
        # Eagerly the integers of the generator take memory: one after the other.
        together.setdefault(dtype if torch.compiler.is_compiling() else i, []).append(i)
    drawn: dict[int, Tensor] = {}
    for group in together.values():
        sizes = [(like[i][0][0], math.prod(like[i][0][1:])) for i in group]
        rows = random.normal_each(torch.cat([parts[i] for i in group]), sizes, like[group[0]][1])
        drawn |= {i: x.reshape(like[i][0]) for i, x in zip(group, rows, strict=True)}
    return [drawn[i] for i in range(len(like))]


def _products(
    curvature: Curvature, v: Mapping[str, Tensor], params: Flat
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """v, rounded to the parameters' dtypes, and H v, for the leaves in v; v is 0 at the others."""
    probes = {k: v[k].to(p.dtype) if k in v else torch.zeros_like(p) for k, p in params.items()}
    products = curvature(probes)
    for k in v:
        if k not in products:
            raise ValueError(
                f"curvature(v) has no product for params[{k!r}], expected one: the parameter has a gradient"
            )
    return {k: probes[k].to(x.dtype) for k, x in v.items()}, {k: products[k] for k in v}


def _stacks(active: Mapping[str, Factors], leaves: Flat) -> dict[str, Tensor]:
    return {n: buckets.stack(f.bucket, leaves) for n, f in active.items()}


def _unflatten(flat: Iterable[Tensor], active: Mapping[str, Factors]) -> dict[str, list[Tensor]]:
    rest = iter(flat)
    return {n: [next(rest) for _ in f.fields] for n, f in active.items()}


def _check_extras(refresh: Any, curvature: Curvature | None, newton: bool) -> None:
    if not (refresh is None or isinstance(refresh, bool)):
        raise ValueError(f"refresh={short(refresh)}: expected None, True or False")
    if newton and curvature is None:
        raise ValueError("curvature=None: expected a function v -> H v, because scale_by_psgd has curvature=True")
    if not newton and curvature is not None:
        raise ValueError(
            "curvature: got a function, but this scale_by_psgd fits its factors on gradients; "
            "build it with curvature=True"
        )
