"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

Each mode of a matrix (or tensor) has a covariance GG, an average of outer products of the updates, and an orthonormal
basis Q of its eigenvectors. Adam runs on the rotated update, u' = Q_0^T u Q_1, and its step is rotated back. The first
step takes Q from an eigendecomposition and moves nothing; later Q follows GG by one orthogonal iteration when due.

All state of the matrices is stacked by shape, moments included: these live in the rotated, merged and split
coordinates, where they match no parameter entry by entry, and stacking them anew at each step would copy them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hbfunc import buckets, random
from hbfunc.branch import branch
from hbfunc.buckets import Bucket
from hbfunc.contract import RefreshSchedule, Transform, remembered
from hbfunc.devices import choose
from hbfunc.forms import short
from hbfunc.leaves import Flat, Layout, Leaves, State, compute_dtype, in_dtype_of, kept
from hbfunc.linalg import eigenbasis as bases
from hbfunc.opaque import materialize
from hbfunc.ranges import check_choice, check_int, check_number
from hbfunc.schedules import Number, at, count_zeros, ema_weight, increment
from hbfunc.stacks import Rows, along, matrix_rule, put, take
from hbfunc.stacks import layout as stacks_layout
from hbfunc.transforms.adaptive import check_adam, check_flag, ema
from hbfunc.transforms.inner import Inner, Stacks, inner_rule

KL_START = 0.1  # of the factors, times the identity


@remembered
def scale_by_soap(
    beta1: Number = 0.9,
    beta2: Number = 0.95,
    shampoo_beta: Number = 0.95,
    eps: float | Tensor = 1e-8,
    *,
    precondition_frequency: int | Tensor = 2,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
    split: bool = False,
    inner: str = "adam",
    use_precond_schedule: bool = False,
    precond_scheduler: Sequence[float] = (1 / 3, 9),
    seed: int | Tensor = 0,
    stop_gradient: bool = False,
    refresh_phase: int = 0,
    qr: str = "auto",
    kl: bool = False,
    slow_beta: Number | None = None,
    alpha: Number | None = None,
) -> Transform:
    """SOAP, algorithm 3 of arXiv 2409.11321, with debiased averages. With t a leaf's own count of steps, from 1:

    t = 1: GG_d = outer product of u over mode d, Q_d its eigenvectors; the update is 0, the moments stay as they are.
    t > 1: the inner rule's step t - 1 on the rotated update; GG_d <- average with shampoo_beta; when due, Q_d <- QR of
    GG_d Q_d, columns ordered by eigenvalue estimate, and the moments move along with the basis.

    beta1, beta2: of the inner rule, in [0, 1). A function of t is called with the inner rule's count, t - 1.
    shampoo_beta: of GG, in [0, 1). eps: at least 0, the inner rule divides by max(sqrt(v), eps).
    precondition_frequency: Q is due when t is a multiple of it; a tensor may differ between the lanes of a
        `torch.vmap`.
    refresh_phase: due when t - refresh_phase is that multiple; 1 gives the steps of the authors' code, whose count
        begins at the second step. Without use_precond_schedule only.
    use_precond_schedule, precond_scheduler: due with probability `refresh_probability(t, *precond_scheduler)` instead,
        drawn from a key in the state that `seed` gives, once per step for all leaves of the same count.
    max_precond_dim: larger dims get no basis, nor do dims of size 1.
    precondition_1d: give parameters of one dim a basis, too.
    merge_dims: multiply dims together up to max_precond_dim, see `hbfunc.buckets.merge_dims`.
    split: cut dims that are larger than max_precond_dim into chunks; each block is preconditioned by itself.
    data_format: "channels_last" for 4-d leaves whose dims are [out, height, width, in].
    normalize_grads: divide the update of each leaf by its root mean square.
    correct_bias: debias the moments; False keeps plain averages that start at 0.
    inner: the rule in the rotated coordinates: "adam", "laprop", "nadam" (`scale_by_nadam`) or "ademamix"
        (`scale_by_ademamix`).
    slow_beta, alpha: of "ademamix", whose second momentum they are about, by default 0.9999 and 5; None for the others.
    kl: fit the covariances to the update's in the sense of Kullback and Leibler (Lin et al. 2025, arXiv 2509.03378):
        the outer product over a mode is the mean over its fibres after the other modes are whitened, by the bases Q and
        the eigenvalues max(diag(Q^T GG Q), eps) of the step before. GG starts at 0.1 I, and its averages are plain,
        because debiasing would throw this start away.
    qr: form of the QR factorization: "householder"; "cholesky", by products of matrices, faster on GPUs, equal
        up to signs and rounding where a covariance has full rank; or "auto", what `hbfunc.devices` has for the device.
    stop_gradient: keep derivatives from going through the bases. By default hypergradients are exact; but a covariance
        of deficient rank (rows > steps * columns, dead units) has no derivative, and they may be inf or NaN there.

    `update(..., refresh=)`: None decides in the graph and leaf by leaf. The other values are for callers who know the
    step of all leaves (see `refresh_schedule`): "first" is t = 1 for all, True refreshes all, False none. A leaf whose
    t is 1 under True or False starts from the identity, where None gives it eigenvectors.

    Raises ValueError or TypeError for a Python number or choice outside its range.
    """
    check_adam(beta1, beta2, eps)
    check_flag("kl", kl)
    rule = inner_rule(inner, beta1, beta2, eps, correct_bias, slow_beta, alpha)

    def step(x: Tensor, s: Stacks, weights: Sequence[Tensor]) -> tuple[Tensor, Stacks]:
        qs = [s.get(f"Q_{d}") for d in range(x.ndim - 1)]
        u, moments = rule.step(bases.project(x, qs), s, weights)
        return bases.project_back(u, qs), moments

    return in_eigenbases(
        "scale_by_soap",
        rule._replace(step=step),
        shampoo_beta,
        eps if kl else None,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        normalize_grads=normalize_grads,
        data_format=data_format,
        split=split,
        use_precond_schedule=use_precond_schedule,
        precond_scheduler=precond_scheduler,
        seed=seed,
        stop_gradient=stop_gradient,
        refresh_phase=refresh_phase,
        qr=qr,
    )


def in_eigenbases(
    name: str,
    rule: Inner,
    shampoo_beta: Number,
    kl_eps: float | Tensor | None,
    *,
    precondition_frequency: int | Tensor,
    max_precond_dim: int,
    merge_dims: bool,
    precondition_1d: bool,
    normalize_grads: bool,
    data_format: str,
    split: bool,
    use_precond_schedule: bool,
    precond_scheduler: Sequence[float],
    seed: int | Tensor,
    stop_gradient: bool,
    refresh_phase: int,
    qr: str,
) -> Transform:
    """A rule on stacks that are given with their covariances, as this step leaves them, and with the bases that the
    step before left. kl_eps: fit as with `kl`, eigenvalues at least this. The others: see `scale_by_soap`."""
    check_number("shampoo_beta", shampoo_beta, 0, 1, open_high=True)
    _check_choices(precondition_frequency, max_precond_dim, data_format, precond_scheduler)
    check_int("refresh_phase", refresh_phase, 0)
    check_choice("qr", qr, ("auto", "householder", "cholesky"))
    if use_precond_schedule and refresh_phase:
        raise ValueError(f"refresh_phase={refresh_phase}: expected 0 with use_precond_schedule=True")
    due = _due(precondition_frequency, precond_scheduler if use_precond_schedule else None, refresh_phase)
    first = partial(_first, stop_gradient=stop_gradient)
    again = partial(_again, rule, stop_gradient=stop_gradient, qr=qr)

    def plan(params: Flat) -> dict[str, Bucket]:
        return buckets.plan(
            params,
            merge=partial(buckets.merge_dims, max_dim=max_precond_dim) if merge_dims else None,
            split=max_precond_dim if split else None,
            channels_last=data_format == "channels_last",
        )

    def modes(bucket: Bucket) -> list[int]:
        """The modes that get a factor. Merging keeps dim 0, so a bucket of one dim has leaves of one dim."""
        if len(bucket.shape) == 1 and not precondition_1d:
            return []
        return [d for d, size in enumerate(bucket.shape) if 1 < size <= max_precond_dim]

    def init(params: Leaves) -> State:
        state: State = {"count": count_zeros(params), **{key: {} for key in rule.moments((0,))}}
        if use_precond_schedule and params:
            state["key"] = random.key(seed, next(iter(params.values())).device)
        for name, bucket in plan(params).items():
            k, like = len(bucket.blocks), params[bucket.paths[0]]
            zeros = partial(torch.zeros, dtype=compute_dtype(like), device=like.device)
            for key in rule.moments(modes(bucket)):
                state.setdefault(key, {})[name] = zeros(k, *bucket.shape)
            for d in modes(bucket):
                size = bucket.shape[d]
                eye = torch.eye(size, dtype=compute_dtype(like), device=like.device)
                start = zeros(k, size, size) if kl_eps is None else (KL_START * eye).repeat(k, 1, 1)
                state.setdefault(f"GG_{d}", {})[name] = start
                state.setdefault(f"Q_{d}", {})[name] = eye.repeat(k, 1, 1)
        return state

    def covariances(x: Tensor, s: Stacks, weight: Tensor, factored: Sequence[int]) -> Stacks:
        """Covariances of one bucket, moved by the weight of x in them."""
        order = x.ndim - 1
        if kl_eps is None:
            new = {f"GG_{d}": bases.outer_product(x, d, order) for d in factored}
        else:
            qs = [s.get(f"Q_{d}") for d in range(order)]
            values = [eigenvalues(q, s[f"GG_{d}"], kl_eps) if q is not None else None for d, q in enumerate(qs)]
            found = bases.whitened_outer_products(x, qs, values)
            new = {f"GG_{d}": gg for d, gg in enumerate(found) if gg is not None}
        return {key: ema(s[key], gg, along(weight, gg)) for key, gg in new.items()}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, refresh: bool | str | None = None
    ) -> tuple[dict[str, Tensor], State]:
        if not (refresh is None or isinstance(refresh, bool) or refresh == "first"):
            raise ValueError(f"refresh={short(refresh)}: expected None, True, False or 'first'")
        count = increment(state["count"], updates)
        planned = plan(params)
        rows = {n: buckets.present(b, updates) for n, b in planned.items()}
        active = {n: b for n, b in planned.items() if rows[n] != ()}
        if not active:
            return updates, kept(state, count=count)
        t = torch.stack([count[path] for b in active.values() for path in b.paths if path in updates])
        kinds = [key for key, x in state.items() if isinstance(x, dict) and key != "count"]
        stacks = {n: {key: take(state[key][n], rows[n]) for key in kinds if n in state[key]} for n in active}
        scalars = _scalars(t, stacks, rule, shampoo_beta, debias=kl_eps is None)

        steps = {}
        for name, bucket in active.items():
            x, s, (moves, *weights, w) = buckets.stack(bucket, updates), stacks[name], scalars[name]
            gg = covariances(x, s, w, modes(bucket))
            if refresh == "first":
                steps[name] = torch.zeros_like(x)
                stacks[name] = {**s, **gg}
                continue
            u, moments = rule.step(x, {**s, **gg}, weights)
            moving = along(moves, x) > 0
            steps[name] = torch.where(moving, u, 0)
            if refresh is None:  # a weight of 0 does not keep an infinite first gradient out
                moments = {key: torch.where(moving, new, s[key]) for key, new in moments.items()}
            stacks[name] = {**s, **moments, **gg}

        if refresh is None:
            stacks = _where(t == 1, first, ("Q_",), stacks)
            changes = ("Q_", *rule.rotated, *rule.permuted)
            stacks = _where((t > 1) & due(t, state.get("key")), again, changes, stacks)
        elif refresh:
            refreshed = first if refresh == "first" else again
            stacks = {n: {**s, **refreshed(s)} for n, s in stacks.items()}

        stepped = {**updates, **buckets.unstack(active, steps, updates)}
        if normalize_grads:
            stepped = {k: _normalized(x) for k, x in stepped.items()}
        return stepped, kept(state, count=count, **_put(state, stacks, rows))

    def layout(params: Flat) -> Layout:
        planned = plan(params)
        factored = {n: modes(bucket) for n, bucket in planned.items()}
        return stacks_layout(
            planned, lambda n: [*rule.moments(factored[n]), *(f"{x}_{d}" for d in factored[n] for x in ("GG", "Q"))]
        )

    def refreshes(state: State) -> RefreshSchedule | None:
        frequency = precondition_frequency
        if isinstance(frequency, Tensor):
            if frequency.device.type != "cpu":
                return None  # its value is not known here
            frequency = int(frequency)
        key = state.get("key")
        return refresh_schedule(frequency, use_precond_schedule, precond_scheduler, seed, key, refresh_phase)

    def refreshed(state: State) -> State:
        kinds = [key for key, x in state.items() if isinstance(x, dict) and key != "count"]
        names = dict.fromkeys(n for key in kinds for n in state[key])
        stacks = {n: {key: state[key][n] for key in kinds if n in state[key]} for n in names}
        new = {n: {**s, **again(s)} for n, s in stacks.items()}
        return kept(state, **_put(state, new, dict.fromkeys(names)))

    needs, moves = ("refresh",), False
    return matrix_rule(
        init, update, name, needs, layout, refreshes=refreshes, refreshed=refreshed, first_step_moves=moves
    )


def refresh_probability(t: Tensor, power: float = 1 / 3, base: float = 9) -> Tensor:
    """Probability that SOAP's bases are refreshed at step t: 1 / (1 + log10(t^power)^base).

    t: float64. With the defaults 1 at t = 1, .9746 at 100, .5 at 1000, .0698 at 10,000.
    """
    return 1 / (1 + torch.log10(t**power) ** base)


def refresh_schedule(
    precondition_frequency: int = 2,
    use_precond_schedule: bool = False,
    precond_scheduler: Sequence[float] = (1 / 3, 9),
    seed: int | Tensor = 0,
    key: Tensor | None = None,
    refresh_phase: int = 0,
) -> Callable[[int], bool | str]:
    """Make the function of t = 1, 2, ... that says, outside of the graph, what refresh=None does to the bases at step
    t: "first" (take eigenvectors), True (refresh) or False.

    For callers whose leaves share their count. The arguments are options of `scale_by_soap`; `key` is the one in its
    state (None: the one that `seed` gives).

        due = refresh_schedule(precondition_frequency=10)
        updates, state = tx.update(state, grads, params, refresh=due(t))
    """
    if not use_precond_schedule:
        return lambda t: "first" if t == 1 else (t - refresh_phase) % precondition_frequency == 0
    first, second = (random.key(seed) if key is None else key).tolist()
    power, base = precond_scheduler
    return lambda t: "first" if t == 1 else _drawn(first, second, power, base, t - t % 256)[t % 256]


@lru_cache(maxsize=8)
def _drawn(first: int, second: int, power: float, base: float, start: int) -> list[bool]:
    """Whether each of the 256 steps from `start` on is due, drawn from the key (first, second)."""
    with torch.device("cpu"):
        return _due(1, (power, base))(torch.arange(start, start + 256), torch.tensor([first, second])).tolist()


def _due(frequency: int | Tensor, scheduler: Sequence[float] | None, phase: int = 0) -> Callable[[Tensor, Any], Tensor]:
    """Make the function (counts, key) -> whether the bases are due at each count, but for the first step."""
    if scheduler is None:
        return lambda t, key: (t - phase) % at(frequency, t) == 0
    power, base = scheduler

    def drawn(t: Tensor, key: Tensor) -> Tensor:
        draws = torch.vmap(lambda step: random.uniform(random.fold_in(key, step)))(t)
        return draws < refresh_probability(t.to(torch.float64), power, base)

    return drawn


def _scalars(
    t: Tensor, stacks: dict[str, Stacks], rule: Inner, shampoo_beta: Number, debias: bool
) -> dict[str, list[Tensor]]:
    """Per bucket, vectors with an entry per row: is it past its first step; the rule's weights; the EMA weight of GG.

    Computed once for all rows, behind an opaque operation, see `hbfunc.schedules.per_leaf`.
    """
    n, moves = t.to(torch.float64), t > 1
    weights = rule.weights((n - 1).clamp(min=1))
    new = ema_weight(shampoo_beta, n) if debias else torch.ones_like(n) - at(shampoo_beta, n)
    columns = [moves, *[w * moves for w in weights], new]
    moments = {name: s[_some(s)] for name, s in stacks.items()}
    dtype = torch.float64 if any(m.dtype == torch.float64 for m in moments.values()) else torch.float32
    table = materialize(torch.stack([c.to(torch.float64) for c in columns]).to(dtype))
    parts = table.split([len(m) for m in moments.values()], dim=1)
    return {name: list(part.to(m.dtype)) for (name, m), part in zip(moments.items(), parts, strict=True)}


def eigenvalues(q: Tensor, gg: Tensor, eps: float | Tensor) -> Tensor:
    """Estimates of the eigenvalues of a covariance in its basis, at least eps and above 0: [k, n]."""
    tiny = torch.finfo(gg.dtype).tiny
    floor = torch.clamp(eps, min=tiny) if isinstance(eps, Tensor) else max(eps, tiny)
    return torch.clamp(bases.eigenvalues(q, gg), min=in_dtype_of(gg, floor))


def _first(s: Stacks, stop_gradient: bool) -> Stacks:
    """The first bases: eigenvectors of GG, with zeros for what is not finite, because eigh would raise."""
    return {
        key.replace("GG", "Q"): bases.eigenbasis(torch.where(gg.isfinite(), gg.detach() if stop_gradient else gg, 0))
        for key, gg in s.items()
        if key.startswith("GG_")
    }


def _again(rule: Inner, s: Stacks, stop_gradient: bool, qr: str) -> Stacks:
    """The bases after one orthogonal iteration; averages of updates rotated from the old ones to the new, those of
    squares permuted with the columns."""
    dims = [int(key[2:]) for key in s if key.startswith("Q_")]
    if not dims:
        return {}
    qs, ggs = [s[f"Q_{d}"] for d in dims], [s[f"GG_{d}"] for d in dims]
    if stop_gradient:
        ggs = [gg.detach() for gg in ggs]
    if qr == "auto":
        qr = choose("soap_qr", ggs[0].device)
    keys = [*(f"Q_{d}" for d in dims), *rule.rotated, *rule.permuted]
    rotated, permuted = [s[key] for key in rule.rotated], [s[key] for key in rule.permuted]
    return dict(zip(keys, bases.refreshed_bases(dims, qs, ggs, rotated, permuted, qr), strict=True))


def _where(
    rows: Tensor, rule: Callable[[Stacks], Stacks], changes: tuple[str, ...], stacks: dict[str, Stacks]
) -> dict[str, Stacks]:
    """Apply `rule` to the stacks of each bucket in the marked rows, and compute it only if there are any.

    changes: prefixes of the keys that the rule returns.
    """
    stacked = [(n, key) for n, s in stacks.items() if any(k.startswith("GG_") for k in s) for key in s]
    changed = [(n, key) for n, key in stacked if key.startswith(changes)]
    read = [*changed, *[(n, key) for n, key in stacked if key.startswith("GG_")]]
    if not changed:
        return stacks
    sizes = [len(s[_some(s)]) for s in stacks.values()]

    def then(rows: Tensor, *values: Tensor) -> list[Tensor]:
        marked = dict(zip(stacks, rows.split(sizes), strict=True))
        old: dict[str, Stacks] = {}
        for (n, key), x in zip(read, values, strict=True):
            old.setdefault(n, {})[key] = _or_regular(marked[n], x) if key.startswith("GG_") else x
        new = {n: rule(s) for n, s in old.items()}
        return [torch.where(along(marked[n], old[n][key]), new[n][key], old[n][key]) for n, key in changed]

    def otherwise(rows: Tensor, *values: Tensor) -> Sequence[Tensor]:
        return values[: len(changed)]

    values = branch(rows.any(), then, otherwise, [rows, *[stacks[n][key] for n, key in read]])
    new = {n: dict(s) for n, s in stacks.items()}
    for (n, key), x in zip(changed, values, strict=True):
        new[n][key] = x
    return new


def _some(s: Stacks) -> str:
    """The key of one of the stacks of a bucket; a state of other shapes has none, and no stack of what is returned."""
    return next(iter(s), "stack")


def _or_regular(rows: Tensor, gg: Tensor) -> Tensor:
    """gg in the marked rows; elsewhere a matrix with distinct eigenvalues, whose derivatives are finite."""
    return torch.where(along(rows, gg), gg, torch.arange(1, gg.shape[-1] + 1, dtype=gg.dtype, device=gg.device).diag())


def _normalized(u: Tensor) -> Tensor:
    return u / torch.sqrt(u.square().mean().clamp(min=torch.finfo(u.dtype).tiny))


def _put(state: State, new: dict[str, Stacks], rows: dict[str, Rows]) -> dict[str, Stacks]:
    """Sort the new stacks by state key and bucket, with the old rows where there are no new ones."""
    stacks: dict[str, Stacks] = {}
    for name, s in new.items():
        for key, x in s.items():
            stacks.setdefault(key, {})[name] = x if rows[name] is None else put(state[key][name], rows[name], x)
    return stacks


def _check_choices(frequency: Any, max_precond_dim: Any, data_format: str, scheduler: Any) -> None:
    if isinstance(frequency, Tensor) and (frequency.ndim or frequency.is_complex()):
        kind = f"{frequency.dtype} of shape {tuple(frequency.shape)}"  # sweeps bring whole numbers in float64
        raise ValueError(f"precondition_frequency is {kind}, expected a 0-dim real tensor")
    if not isinstance(frequency, Tensor):
        check_int("precondition_frequency", frequency, 1)
    check_int("max_precond_dim", max_precond_dim, 1)
    check_choice("data_format", data_format, ("channels_first", "channels_last"))
    if not isinstance(scheduler, Sequence) or isinstance(scheduler, str) or len(scheduler) != 2:
        raise ValueError(f"precond_scheduler={short(scheduler)}: expected two numbers, power and base")
    for number in scheduler:
        check_number("precond_scheduler", number, 0, float("inf"), open_low=True, open_high=True)
