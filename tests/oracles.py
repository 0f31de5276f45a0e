"""Every optimizer again, in plain NumPy float64, written from papers and definitions: the library is held to it.

Nothing here is fast, and nothing is shared with the library. Each optimizer is one function

    adamw(params, grads, **options) -> trajectory

of `params: {path: array}` and `grads: [{path: array or None}, ...]`, one dict per step. The trajectory is a list of
`{path: array}`: the parameters after each step. Arguments are not mutated. Options carry the documented names and
defaults. All numbers are float64; `storage_dtype`, `q_dtype`, `seed` and whatever else changes no float64 number are
accepted and ignored.

Beside the documented options every optimizer takes those of `run`: `lr` may be a function of t; `project` maps each
parameter after its step; `caution_scaling=False` drops caution's factor; `states`, an empty dict, is filled with each
leaf's state (t, m, v, Q, ...) to look into.

How a step is read, where words leave a choice:
* t, and every count, is the leaf's own: the steps at which it had a gradient, from 1. `due`, `balance` and `probes` are
  asked with this t.
* `u` is the running update: inside the rules it is g after MARS and gradient_clipping, also where SOAP takes outer
  products and PSGD says "g". Caution compares with the raw g.
* Caution keeps an entry when sign(u) = sign(g), with sign in {-1, 0, 1}: two zeros agree and count as kept.
* MARS's beta1 is betas[0] also where the rule has no momentum (RMSprop); PSGD's is beta.
* Where the parameters "do not move" (ADOPT and SOAP at t=1) there is no weight decay either.
* Leaves without elements are left as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # of float64
State = dict[Any, Any]
Params = dict[str, Array]
Grads = Sequence[Mapping[str, "Array | None"]]
Rule = Callable[[Array, State], "Array | None"]
Clip = str | Callable[[Array], Array] | None


# -- section 1: pieces of a step ------------------------------------------------------------------------------------


def b(beta: float, t: int) -> float:
    """Decay that keeps an exponential average debiased: `m <- b*m + (1-b)*x` equals `m_raw / (1 - beta^t)`."""
    return 1 - (1 - beta) / (1 - beta**t)


def D(v: Array, eps: float, add_eps: bool = False) -> Array:
    return np.sqrt(v) + eps if add_eps else np.maximum(np.sqrt(v), eps)


def palm_beta2(t: int, beta2_scale: float) -> float:
    return 1 - t**-beta2_scale


def second(beta2: float, t: int, palm: bool, beta2_scale: float) -> float:
    """Decay of the second moment: debiased, or PaLM's as it is."""
    return palm_beta2(t, beta2_scale) if palm else b(beta2, t)


def mars(g: Array, g_prev: Array, beta1: float, mars_gamma: float) -> Array:
    return g + mars_gamma * beta1 / (1 - beta1) * (g - g_prev)


def caution(u: Array, g: Array, scaling: bool = True) -> Array:
    keep = np.sign(u) == np.sign(g)
    return np.where(keep, u, 0.0) * (u.size / max(int(keep.sum()), 1) if scaling else 1.0)


def l2_clip_(x: Array, clip_at: float = 1.0) -> Array:
    norm = np.sqrt(np.sum(x * x))
    return x * (clip_at / norm) if norm > clip_at else x


def rmsnorm_clip_(x: Array, clip_at: float = 1.0) -> Array:
    return l2_clip_(x, clip_at * math.sqrt(x.size))


def mu_law_compress(x: Array, mu: float = 127.0) -> Array:
    return np.sign(x) * np.log(1 + mu * np.abs(x)) / np.log(1 + mu)


def a_law_compress(x: Array, A: float = 87.6) -> Array:
    a = A * np.abs(x)
    return np.sign(x) * np.where(a < 1, a, 1 + np.log(np.maximum(a, 1))) / (1 + np.log(A))


def trust_region_clip_(x: Array, lerp: float = 0.9, scale: float = 1.5) -> Array:
    y = x / scale
    return np.clip(scale * ((1 - lerp) * np.sign(y) * np.log(1 + np.abs(y)) + lerp * np.tanh(y)), -2, 2)


def identity(x: Array) -> Array:
    return x


CLIPS: dict[str, Callable[[Array], Array]] = {
    f.__name__: f for f in (l2_clip_, rmsnorm_clip_, mu_law_compress, a_law_compress, trust_region_clip_, identity)
}


def clip(x: Array, how: Clip) -> Array:
    return x if how is None else CLIPS[how](x) if isinstance(how, str) else how(x)


def ema(s: dict[Any, Any], name: str | int, x: Array, decay: float) -> Array:
    s[name] = decay * s.get(name, 0.0) + (1 - decay) * x
    return s[name]


corrected, cautious = mars, caution  # the options of `run` carry the names of these functions


def run(
    params: Mapping[str, Array],
    grads: Grads,
    rule: Rule,
    lr: float | Callable[[int], float],
    beta1: float,
    *,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    mars: bool = False,
    mars_gamma: float = 0.0025,
    caution: bool = False,
    caution_scaling: bool = True,
    gradient_clipping: Clip = None,
    update_clipping: Clip = None,
    storage_dtype: str = "float32",
    seed: int = 0,
    max_grad_norm: float | None = None,
    decay: str = "coupled",
    lr_peak: float | None = None,
    decay_mask: Callable[[str, Any], bool] | None = None,
    cautious_weight_decay: bool = False,
    hyperball: bool = False,
    schedule_free: bool = False,
    schedule_free_beta: float = 0.9,
    project: Callable[[Array], Array] = identity,
    states: dict[str, State] | None = None,
    move: Callable[[Array, Array, float, Any, State], Array] | None = None,
    view: Callable[[Array, State], Array] = lambda p, s: p,
) -> list[Params]:
    """g -> MARS -> norm -> gradient_clipping -> rule -> update_clipping -> caution -> p*(1 - lr*weight_decay) - lr*u.

    `rule(u, s)` returns the update, or None when the parameter stays where it is; `move` replaces the last arrow;
    `view` says what is reported.
    """
    p = {k: np.array(x, np.float64) for k, x in params.items()}
    states = {} if states is None else states
    states.update({k: {"t": 0, "path": k} for k in p})
    move = averaging(schedule_free_beta) if schedule_free else move
    radius = {k: float(np.sqrt(np.sum(x * x))) if hyperball and x.ndim > 1 else 0.0 for k, x in p.items()}

    def differences(grad: Mapping[str, Array | None]) -> Params:
        """The gradients after MARS and the clip of their norm."""
        given = {k: np.array(g, np.float64) for k, g in grad.items() if g is not None and k in p}
        found = dict(given)
        if mars:
            for k, g in given.items():
                found[k] = corrected(g, states[k].get("g_prev", np.zeros_like(g)), beta1, mars_gamma)
                states[k]["g_prev"] = g
        if max_grad_norm is not None:
            norm = math.sqrt(sum(float(np.sum(u * u)) for u in found.values()))
            found = {k: u * min(1.0, max_grad_norm / norm) if norm else u for k, u in found.items()}
        return found

    def shrinkage(p: Array, u: Array, rate: float, s: State) -> Any:
        """The weight decay of each entry."""
        peak = lr if lr_peak is None else lr_peak
        follows: Any = {"coupled": lambda: 1.0, "adamc": lambda: rate / peak, "independent": lambda: 1 / peak}[decay]()
        decays = decay_mask is None or decay_mask(s["path"], p)
        return weight_decay * follows * decays * (u * p >= 0 if cautious_weight_decay else 1.0)

    def step(p: Array, g: Array, u: Array, s: State) -> Array:
        s["t"] += 1
        if p.size == 0:
            return p
        rate = (lr(s["t"]) if callable(lr) else lr) * (min(1.0, s["t"] / warmup_steps) if warmup_steps > 0 else 1.0)
        s["p"] = p  # for rules that look at it
        direction = rule(clip(u, gradient_clipping), s)
        if direction is None and schedule_free:  # the step has its weight in the average
            return move(p, np.zeros_like(p), rate, 0.0, s)
        if direction is None:
            return p
        u = clip(direction, update_clipping)
        if caution:
            u = cautious(u, g, caution_scaling)
        if radius[s["path"]]:
            if not u.any():
                return p
            new = p - rate * radius[s["path"]] * u / np.linalg.norm(u)
            return new * (radius[s["path"]] / np.linalg.norm(new))
        if hyperball and p.ndim > 1:
            return p - rate * u
        if move is not None:
            return move(p, u, rate, shrinkage(p, u, rate, s), s)
        return p * (1 - rate * shrinkage(p, u, rate, s)) - rate * u

    trajectory = []
    for grad in grads:
        after = differences(grad)
        for k, s in states.items():
            if k in after:
                p[k] = project(np.asarray(step(p[k], np.asarray(grad[k], np.float64), after[k], s)))
        trajectory.append({k: np.array(view(x, states[k])) for k, x in p.items()})
    return trajectory


def averaging(
    beta: float, weight_lr_power: float = 2.0, r: float = 0.0, largest_rate: bool = False
) -> Callable[[Array, Array, float, Any, State], Array]:
    """The step of Schedule-Free learning (Defazio et al. 2024), in the place of the last arrow of `run`."""

    def move(y: Array, u: Array, rate: float, weight_decay: Any, s: State) -> Array:
        z = s.get("z", y)
        u = u + weight_decay * y
        s["lr_max"] = max(abs(rate), s.get("lr_max", 0.0)) if largest_rate else abs(rate)
        w = s["lr_max"] ** weight_lr_power * max(s["t"], 1) ** r
        s["weight_sum"] = s.get("weight_sum", 0.0) + w
        c = w / s["weight_sum"] if s["weight_sum"] > 0 else 0.0
        s["z"] = z - rate * u
        return y + c * (z - y) + u * rate * (beta * (1 - c) - 1)

    return move


# -- section 2: first-order rules -----------------------------------------------------------------------------------


def scale_by_adam(u: Array, s: State, decay1: float, decay2: float, eps: float, add_eps: bool = False) -> Array:
    m, v = ema(s, "m", u, decay1), ema(s, "v", u * u, decay2)
    return m / D(v, eps, add_eps)


def scale_by_laprop(u: Array, s: State, decay1: float, decay2: float, eps: float) -> Array:
    v = ema(s, "v", u * u, decay2)
    return ema(s, "m", u / D(v, eps), decay1)


def adamw(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    add_eps: bool = False,
    **options: Any,
) -> list[Params]:
    """Adam (Kingma & Ba 2015) with decoupled decay (Loshchilov & Hutter 2019), eps as a clamp."""

    def rule(u: Array, s: State) -> Array:
        return scale_by_adam(u, s, b(betas[0], s["t"]), second(betas[1], s["t"], palm, beta2_scale), eps, add_eps)

    return run(params, grads, rule, lr, betas[0], **options)


def rmsprop(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    palm: bool = False,
    beta2_scale: float = 0.8,
    add_eps: bool = False,
    **options: Any,
) -> list[Params]:
    """u/D(v, eps) with a debiased v. `r` and `weight_lr_power` do nothing."""

    def rule(u: Array, s: State) -> Array:
        return u / D(ema(s, "v", u * u, second(betas[1], s["t"], palm, beta2_scale)), eps, add_eps)

    return run(params, grads, rule, lr, betas[0], **options)


def laprop(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    **options: Any,
) -> list[Params]:
    """LaProp (Ziyin et al. 2020): momentum of the normalized gradient."""

    def rule(u: Array, s: State) -> Array:
        return scale_by_laprop(u, s, b(betas[0], s["t"]), second(betas[1], s["t"], palm, beta2_scale), eps)

    return run(params, grads, rule, lr, betas[0], **options)


def adopt(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    clip_exp: float | None = 0.25,
    debias: bool = True,
    **options: Any,
) -> list[Params]:
    """ADOPT (Taniguchi et al. 2024), as in the authors' code since the clip: normalize by the old v, clip, average.

    m is plain, from 0. Without the clip, entries whose v is 0 add nothing. PaLM's t is the step's, 1 at v = u^2.
    """

    def rule(u: Array, s: State) -> Array | None:
        t = s["t"]
        if t == 1:
            s["v"] = u * u
            return None
        n = u / np.maximum(D(s["v"], eps), 1e-150)
        bound = math.inf if clip_exp is None else (t - 1) ** clip_exp
        n = np.where(s["v"] == 0, 0.0, n) if clip_exp is None else np.clip(n, -bound, bound)
        m = ema(s, "m", n, betas[0])
        ema(s, "v", u * u, second(betas[1], t, palm, beta2_scale) if debias or palm else betas[1])
        return m

    return run(params, grads, rule, lr, betas[0], **options)


def sfadamw(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    palm: bool = False,
    beta2_scale: float = 0.8,
    add_eps: bool = False,
    largest_rate: bool = False,
    report: str = "y",
    **options: Any,
) -> list[Params]:
    """Schedule-Free AdamW (Defazio et al. 2024). Reports y, what the parameter holds, or by `report` x or z.

    The Schedule-Free step takes the place of the last arrow of a step, decay and move: update_clipping and caution act
    on u/D(v, eps), as in every other optimizer, and weight_decay*y is added to what they leave. While the sum
    of weights is 0 (lr = 0 from the start) y = z, and c does not matter.
    """

    def rule(u: Array, s: State) -> Array:
        return u / D(ema(s, "v", u * u, second(betas[1], s["t"], palm, beta2_scale)), eps, add_eps)

    def view(y: Array, s: State) -> Array:
        z = s.get("z", y)
        return {"y": lambda: y, "z": lambda: z, "x": lambda: y + (1 - 1 / betas[0]) * (z - y)}[report]()

    move = averaging(betas[0], weight_lr_power, r, largest_rate)
    return run(params, grads, rule, lr, betas[0], move=move, view=view, **options)


def sfadamw_eval(params: Mapping[str, Array], grads: Grads, **options: Any) -> list[Params]:
    """The x of Schedule-Free AdamW after each step: what `eval()` puts into the parameters."""
    return sfadamw(params, grads, report="x", **options)


# -- section 3: orthogonal rules ------------------------------------------------------------------------------------


def polar(x: Array) -> Array:
    """U V^T of the singular value decomposition."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def iterate_polar(x: Array, coefficients: Sequence[tuple[float, float, float]]) -> Array:
    for a, c3, c5 in coefficients:
        gram = x @ x.T
        x = a * x + (c3 * gram + c5 * gram @ gram) @ x
    return x


def newtonschulz(
    x: Array, coefficients: Sequence[tuple[float, float, float]] = 5 * [(3.4445, -4.7750, 2.0315)]
) -> Array:
    """Five quintic steps (K. Jordan), or others, on the wide orientation."""
    if x.shape[0] > x.shape[1]:
        return newtonschulz(x.T, coefficients).T
    return iterate_polar(x / (np.linalg.norm(x) + 1e-7), coefficients)


POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def polar_express(x: Array) -> Array:
    """Polar Express (Amsel et al. 2025, arXiv 2505.16932), its published schedule of five steps."""
    if x.shape[0] > x.shape[1]:
        return polar_express(x.T).T
    return iterate_polar(x / (1.02 * np.linalg.norm(x) + 1e-6), POLAR_EXPRESS)


SCALES: dict[str, Callable[[int, int], float]] = {
    "shape": lambda m, n: math.sqrt(max(1.0, m / n)),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
}


def each_matrix(
    u: Array,
    fn: Callable[[Array, int], Array],
    path: str = "",
    *,
    scale: Any = "shape",
    batch_dims: Any = 0,
    heads: Any = None,
    split_sizes: Any = None,
    steps: Any = None,
    coefficients: Any = None,
) -> Array:
    """fn(x, i) for each matrix x of a leaf, the i-th of it, times its scale: the entries of a batch one after the
    other, and of each its blocks of rows. `steps` and `coefficients` are in the fn."""
    batch_dims, heads, split_sizes = (o(path, u) if callable(o) else o for o in (batch_dims, heads, split_sizes))
    out, i = np.array(u), 0
    for index in np.ndindex(*u.shape[: batch_dims or 0]):
        if u[index].ndim < 2:
            continue
        entry = u[index].reshape(u[index].shape[0], -1)
        sizes = split_sizes or [len(entry) // (heads or 1)] * (heads or 1)
        done = []
        for block in np.split(entry, np.cumsum(sizes)[:-1]):
            done.append(fn(block, i) * (SCALES[scale] if isinstance(scale, str) else scale)(*block.shape))
            i += 1
        out[index] = np.concatenate(done).reshape(u[index].shape)
    return out


def orthogonalize_update(u: Array, method: Callable[[Array], Array], path: str = "", **shapes: Any) -> Array:
    return each_matrix(u, lambda x, i: method(x), path, **shapes)


SHAPES = ("scale", "batch_dims", "heads", "split_sizes", "steps", "coefficients")


def apart(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of matrices, and the others."""
    return {k: v for k, v in options.items() if k in SHAPES}, {k: v for k, v in options.items() if k not in SHAPES}


def muon(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    nesterov: bool = True,
    orthogonalize: Callable[[Array], Array] = polar,
    **options: Any,
) -> list[Params]:
    """Muon (K. Jordan 2024): s <- beta*s + u, then orthogonalize. `betas[1]`, `eps` and PaLM have nothing to act on."""
    shapes, options = apart(options)

    def rule(u: Array, s: State) -> Array:
        s["m"] = betas[0] * s.get("m", 0.0) + u
        return orthogonalize_update(u + betas[0] * s["m"] if nesterov else s["m"], orthogonalize, s["path"], **shapes)

    return run(params, grads, rule, lr, betas[0], **options)


def muon_laprop(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    orthogonalize: Callable[[Array], Array] = polar,
    **options: Any,
) -> list[Params]:
    """LaProp, then orthogonalize."""
    shapes, options = apart(options)

    def rule(u: Array, s: State) -> Array:
        decay1, decay2 = b(betas[0], s["t"]), second(betas[1], s["t"], palm, beta2_scale)
        return orthogonalize_update(scale_by_laprop(u, s, decay1, decay2, eps), orthogonalize, s["path"], **shapes)

    return run(params, grads, rule, lr, betas[0], **options)


# -- shapes of sections 4 and 5 -------------------------------------------------------------------------------------


def merge_dims(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Keep dim 0; multiply the others together from last to first while the product stays <= limit.

    A dim of size 1 is a factor like any other: [128, 1, 1] becomes [128, 1], not [128].
    """
    rest: list[int] = []
    for n in reversed(shape[1:]):
        if rest and rest[0] * n <= limit:
            rest[0] *= n
        else:
            rest.insert(0, n)
    return (*shape[:1], *rest)


def layout(
    shape: tuple[int, ...], limit: int, merge: bool, split: bool, channels_last: bool = False
) -> tuple[Callable[[Array], list[Array]], Callable[[list[Array]], Array]]:
    """`cut`, from a leaf to the blocks that are preconditioned each on its own, and `paste`, back.

    Blocks run over the chunks of the first dim, inside it over those of the second, and so on; a dim's last chunk holds
    the remainder. A 0-d leaf is one block of shape (1,).
    """
    order = (0, 3, 1, 2) if channels_last and len(shape) == 4 else tuple(range(len(shape)))
    moved = tuple(shape[i] for i in order)
    merged = (merge_dims(moved, limit) if merge else moved) or (1,)
    chunks = [[slice(i, i + limit) for i in range(0, n, limit)] if split else [slice(None)] for n in merged]

    def cut(x: Array) -> list[Array]:
        x = x.transpose(order).reshape(merged)
        return [x[where] for where in itertools.product(*chunks)]

    def paste(blocks: list[Array]) -> Array:
        out = np.zeros(merged)
        for where, block in zip(itertools.product(*chunks), blocks, strict=True):
            out[where] = block
        return out.reshape(moved).transpose(np.argsort(np.array(order, int)))

    return cut, paste


def mode(a: Array, x: Array, d: int) -> Array:
    """The matrix `a` times `x` along dim d."""
    return np.moveaxis(np.tensordot(a, x, axes=(1, d)), 0, d)


def outer(x: Array, d: int) -> Array:
    """Mode-d outer product: X_(d) X_(d)^T of the unfolding."""
    rows = np.moveaxis(x, d, 0).reshape(x.shape[d], -1)
    return rows @ rows.T


# -- section 4: SOAP ------------------------------------------------------------------------------------------------


def precond_probability(t: int, precond_scheduler: tuple[float, float] = (1 / 3, 9)) -> float:
    power, base = precond_scheduler
    return 1 / (1 + math.log10(t**power) ** base)


def soap_dims(shape: tuple[int, ...], leaf_ndim: int, max_precond_dim: int, precondition_1d: bool) -> list[int]:
    """The dims of a block that have a factor. "A 1-d leaf" is judged by the parameter, before merging and splitting."""
    if leaf_ndim < 2 and not precondition_1d:
        return []
    return [d for d, n in enumerate(shape) if 1 < n <= max_precond_dim]


def soap_determined(
    shape: tuple[int, ...],
    *,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    split: bool = False,
    data_format: str = "channels_first",
    precondition_1d: bool = False,
) -> bool:
    """Whether one generic gradient gives every factor full rank, so that two implementations agree step by step.

    Otherwise the null space of the first factors is arbitrary. True for square blocks, and wherever each dim with a
    factor is at most the product of the others: (4, 3, 2) unmerged, or (6, 3) with max_precond_dim=3.
    """
    cut, _ = layout(shape, max_precond_dim, merge_dims, split, data_format == "channels_last")
    blocks = [x.shape for x in cut(np.zeros(shape))]
    dims = [(s, d) for s in blocks for d in soap_dims(s, len(shape), max_precond_dim, precondition_1d)]
    return all(s[d] ** 2 <= math.prod(s) for s, d in dims)


def kl_covariances(x: Array, s: State, dims: list[int], beta: float, eps: float) -> None:
    """Move the factors (Lin et al. 2025, arXiv 2509.03378), plain averages from 0.1 I: of each, the other dims are
    whitened by their old bases and eigenvalues, and the mean is over fibres."""
    values = {d: np.maximum(np.diag(s["Q"][d].T @ s["GG"][d] @ s["Q"][d]), eps) for d in dims}
    for d in dims:
        white = x
        for e in dims:
            if e != d:
                white = mode(np.diag(values[e] ** -0.5) @ s["Q"][e].T, white, e)
        ema(s["GG"], d, outer(white, d) / (x.size // x.shape[d]), beta)


def inner_nadam(u: Array, s: State, decay1: float, decay2: float, eps: float, t: int, debias: bool) -> Array:
    """beta1 is decay1 as it is: the debiased average is m / (1 - beta1^t)."""
    m, v = ema(s, "m", u, decay1), ema(s, "v", u * u, decay2)
    if not debias:
        return (decay1 * m + (1 - decay1) * u) / D(v, eps)
    return (decay1 * m / (1 - decay1 ** (t + 1)) + (1 - decay1) * u / (1 - decay1**t)) / D(v, eps)


def soap(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: float | Callable[[int], float] = 0.003,
    betas: tuple[float, float] = (0.9, 0.95),
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 2,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
    split: bool = False,
    palm: bool = False,
    beta2_scale: float = 0.8,
    use_precond_schedule: bool = False,
    precond_scheduler: tuple[float, float] = (1 / 3, 9),
    due: Callable[[int], bool] | None = None,
    inner: str = "adam",
    refresh_phase: int = 0,
    kl: bool = False,
    slow_beta: float = 0.9999,
    alpha: float = 5.0,
    power: float | None = None,
    graft: bool = False,
    **options: Any,
) -> list[Params]:
    """SOAP (Vyas et al. 2024): Adam, or another rule, in the eigenbasis of Shampoo's factors. With a `power`, Shampoo
    instead: a momentum times l^-power in that basis, l as the factors are after this step's gradient.

    `due(t)`, asked at t >= 2, replaces the schedule; with `use_precond_schedule` it must be given, since the draws are
    the library's. Compare trajectories where `soap_determined(shape)`. The columns of a basis may differ in sign
    between implementations; trajectories do not.

    Readings: t=1 moves no leaf, not even one without factors. A refresh at t follows the update of t: the new basis is
    first used at t+1. `normalize_grads` divides the whole leaf's u by its RMS (zeros stay zeros), also when the leaf is
    split. `correct_bias` concerns neither PaLM's beta2 nor GG's average. Equal diagonal entries keep their order.
    """
    if use_precond_schedule and due is None:
        raise ValueError("use_precond_schedule needs due=, the injected draws")

    def adapt(u: Array, s: State, t: int) -> Array:
        decay1 = b(betas[0], t) if correct_bias else betas[0]
        decay2 = second(betas[1], t, palm, beta2_scale) if correct_bias or palm else betas[1]
        if inner == "nadam":
            return inner_nadam(u, s, betas[0], decay2, eps, t, correct_bias)
        if inner == "laprop":
            return scale_by_laprop(u, s, decay1, decay2, eps)
        fast = scale_by_adam(u, s, decay1, decay2, eps)
        return fast if inner == "adam" else fast + alpha * ema(s, "slow", u, slow_beta) / D(s["v"], eps)

    def shampoo(x: Array, s: State, t: int, dims: list[int]) -> Array:
        adam = adapt(x, s, t)
        if not dims:
            return adam
        u = s["m"]
        for d in dims:
            Q = s["Q"][d]
            l = np.maximum(np.diag(Q.T @ s["GG"][d] @ Q), eps)  # noqa: E741
            u = mode(Q @ np.diag(l ** -(power or 1 / (2 * len(dims)))) @ Q.T, u, d)
        size = np.linalg.norm(u)
        return u * (np.linalg.norm(adam) / size if size else 0.0) if graft else u

    def block(x: Array, s: State, t: int, dims: list[int]) -> Array:
        s.setdefault("Q", {d: np.eye(x.shape[d]) for d in dims})
        if kl:
            s.setdefault("GG", {d: 0.1 * np.eye(x.shape[d]) for d in dims})
        if t == 1:
            if kl:
                kl_covariances(x, s, dims, shampoo_beta, eps)
            else:
                s["GG"] = {d: outer(x, d) for d in dims}
            s["Q"] = {d: np.linalg.eigh(GG).eigenvectors[:, ::-1] for d, GG in s["GG"].items()}
            return np.zeros_like(x)

        if not graft and power is None:
            u = x
            for d, Q in s["Q"].items():
                u = mode(Q.T, u, d)
            u = adapt(u, s, t - 1)
            for d, Q in s["Q"].items():
                u = mode(Q, u, d)
        if kl:
            kl_covariances(x, s, dims, shampoo_beta, eps)
        else:
            for d in dims:
                ema(s["GG"], d, outer(x, d), b(shampoo_beta, t))
        if graft or power is not None:
            u = shampoo(x, s, t - 1, dims)
        if due(t) if due is not None else (t - refresh_phase) % precondition_frequency == 0:
            for d, Q in s["Q"].items():
                GG = s["GG"][d]
                order = np.argsort(-np.diag(Q.T @ GG @ Q), kind="stable")
                new = np.linalg.qr(GG @ Q[:, order]).Q
                if not graft and power is None:
                    for average in ("m", "slow") if "slow" in s else ("m",):
                        s[average] = mode(new.T @ Q, s[average], d)
                    s["v"] = np.take(s["v"], order, axis=d)
                s["Q"][d] = new
        return u

    def rule(g: Array, s: State) -> Array | None:
        cut, paste = layout(g.shape, max_precond_dim, merge_dims, split, data_format == "channels_last")
        blocks = cut(g)
        s.setdefault("blocks", [{} for _ in blocks])
        u = paste(
            [
                block(x, state, s["t"], soap_dims(x.shape, g.ndim, max_precond_dim, precondition_1d))
                for x, state in zip(blocks, s["blocks"], strict=True)
            ]
        )
        rms = np.sqrt(np.mean(u * u))
        if normalize_grads and rms > 0:
            u = u / rms
        return None if s["t"] == 1 else u

    return run(params, grads, rule, lr, betas[0], weight_decay=weight_decay, **options)


# -- section 5: PSGD-Kron -------------------------------------------------------------------------------------------


def psgd_diagonal(
    shape: tuple[int, ...],
    leaf_ndim: int,
    max_size_triangular: int,
    min_ndim_triangular: int,
    memory_save_mode: str | None,
) -> list[bool]:
    """Which factors of a block are diagonal. "one_diag" takes the block's largest dim, the last of equals.

    The dims of "the leaf" that `min_ndim_triangular` counts are the parameter's, before merging.
    """
    largest = max(range(len(shape)), key=lambda d: (shape[d], d))
    everything = leaf_ndim < min_ndim_triangular or memory_save_mode == "all_diag"
    return [
        everything or n == 1 or n > max_size_triangular or (memory_save_mode == "one_diag" and d == largest)
        for d, n in enumerate(shape)
    ]


def norm_lower_bound(M: Array) -> float:
    top = np.abs(M).max()
    if top == 0:
        return 0.0
    M = M / top
    x = M[:, np.argmax((M * M).sum(0))]
    y = M.T @ x
    return float(np.linalg.norm(M @ (y / np.linalg.norm(y))) * top)


def psgd_fit(Q: list[Array], diagonal: list[bool], G: Array, noise: Array, V: Array, precond_lr: float) -> list[Array]:
    """One step on the criterion E[h^T P h + v^T P^-1 v], P = Q^T Q, for all factors of a block from the same A and B.

    "V with the inverse factors applied" is Q^-T V: for dQ = E Q the criterion's gradient in E is 2 (A A^T - B B^T) with
    A = Q h and B = Q^-T v, not with Q^-1 v. Factors are dense matrices, diagonal ones included.
    """
    A = G + math.sqrt(2.0**-23) * float(np.linalg.norm(G)) / G.size * noise  # 2^-23: float32's eps
    B = V
    for d, q in enumerate(Q):
        A, B = mode(q, A, d), mode(np.linalg.inv(q).T, B, d)
    fitted = []
    for d, q in enumerate(Q):
        T1, T2 = outer(A, d), outer(B, d)
        if diagonal[d]:
            T1, T2 = np.diag(np.diag(T1)), np.diag(np.diag(T2))
        bound = np.abs(T1 + T2).max() if diagonal[d] else norm_lower_bound(T1 + T2)
        fitted.append(q - precond_lr * np.triu(T1 - T2) @ q / bound if bound > 0 else q)
    return fitted


def psgd_balance(Q: list[Array]) -> list[Array]:
    norms = [np.abs(q).max() for q in Q]
    mean = math.prod(norms) ** (1 / len(norms))
    return [q * (mean / n) for q, n in zip(Q, norms, strict=True)]


def psgd_apply(Q: list[Array], x: Array) -> Array:
    for d, q in enumerate(Q):
        x = mode(q.T @ q, x, d)
    return x


def update_probability(n: int) -> float:
    return max(0.03, 0.999 ** max(n - 1000, 0))


def deterministic_due(t: int, p: float | Callable[[int], float] | None) -> bool:
    """stochastic_schedule=False: true when floor(p(1) + ... + p(t)) increases at t."""
    f = update_probability if p is None else p if callable(p) else lambda n: float(p)
    ps = [f(n) for n in range(1, t + 1)]
    return math.floor(math.fsum(ps)) > math.floor(math.fsum(ps[:-1]))


def psgd_kron(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    probes: Callable[[int, str, tuple[int, ...]], tuple[Array, Array]],
    due: Callable[[int], bool] | None = None,
    balance: Callable[[int], bool] = lambda t: False,
    lr: float | Callable[[int], float] = 0.001,
    beta: float = 0.9,
    preconditioner_update_probability: float | Callable[[int], float] | None = None,
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
    exp_avg_input: bool = True,
    precond_init_scale: float = 1.0,
    precond_lr: float = 0.1,
    update_clipping: Clip = "trust_region_clip_",
    **options: Any,
) -> list[Params]:
    """PSGD with Kronecker factors (Li 2018, 2024; E. Walters' kron), whitening the gradient.

    `probes(t, path, shape)` returns (noise, V), both of the *leaf's* shape: they are merged and cut as the gradient is.
    It is asked only when `due(t)`; without `due` the schedule is the deterministic one (`stochastic_schedule=False`).
    `balance(t)` is asked at each fit, and balancing follows the fit; it keeps the product of the factors, so that
    trajectories do not depend on it beyond rounding.

    Readings: |G|_F and numel are the block's; n of the probability is t. A 0-d leaf has one diagonal factor of size 1.
    In a leaf's state "Q" is a list over blocks of lists over dims.
    """

    def initial(x: Array) -> list[Array]:
        return [np.eye(n) * precond_init_scale ** (1 / x.ndim) for n in x.shape]

    def rule(u: Array, s: State) -> Array:
        t = s["t"]
        cut, paste = layout(u.shape, max_size_triangular, merge_dims, split)
        m = ema(s, "m", u, b(beta, t)) if exp_avg_input else u
        old = s.setdefault("Q", [initial(x) for x in cut(u)])
        if due(t) if due is not None else deterministic_due(t, preconditioner_update_probability):
            noise, V = (cut(np.asarray(x, np.float64)) for x in probes(t, s["path"], u.shape))
            G = cut(m if momentum_into_precond_update else u)
            modes = (u.ndim, max_size_triangular, min_ndim_triangular, memory_save_mode)
            s["Q"] = [
                psgd_fit(q, psgd_diagonal(x.shape, *modes), x, n, v, precond_lr)
                for q, x, n, v in zip(old, G, noise, V, strict=True)
            ]
            if balance(t):
                s["Q"] = [psgd_balance(q) for q in s["Q"]]
        return paste([psgd_apply(q, x) for q, x in zip(old if delayed else s["Q"], cut(m), strict=True)])

    return run(params, grads, rule, lr, beta, update_clipping=update_clipping, **options)
