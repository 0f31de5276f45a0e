"""Pictures of optimizers on a problem of two parameters, for the site: a bent valley, and the path through it."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad, vmap

import hbfunc
from hbfunc.chainable import ScheduleFree
from hbfunc.optimizers.base import RecipeOptimizer

STEPS = 80
START = torch.tensor([[-1.2], [1.0]])  # a matrix, so that matrix rules do what they do; its optimum is (1, 1)
RATES = torch.logspace(-2, 0, 9)


class Path(NamedTuple):
    """The rate whose last quarter is lowest, the points of its lane, [STEPS + 1, 2], and the values there."""

    lr: float
    points: Tensor
    values: Tensor


def valley(params: dict[str, Tensor]) -> Tensor:
    """Rosenbrock's function, less steep: half the square along the valley, four squares across it."""
    x, y = params["point"].flatten()
    return 0.5 * (1 - x).square() + 4 * (y - x.square()).square()


def path(cls: type[RecipeOptimizer]) -> Path:
    """A lane for each rate, everything else at the defaults of the class."""
    tx = cls.functional()
    refreshes = None if tx.refreshes is None else tx.refreshes(tx.init({"point": START}))
    lanes = {"point": START.expand(len(RATES), 2, 1)}
    states = vmap(lambda lr, p: cls.functional(lr=lr).init(p))(RATES, lanes)
    seen = vmap(hbfunc.schedule_free_eval_params) if issubclass(cls, ScheduleFree) else lambda states, lanes: lanes
    points = [lanes["point"]]
    for t in range(1, STEPS + 1):
        extras = {} if refreshes is None else {"refresh": refreshes(t)}

        def step(params, state, extras=extras):
            updates, state = tx.update(state, grad(valley)(params), params, **extras)
            return hbfunc.apply_updates(params, updates), state

        lanes, states = vmap(step)(lanes, states)
        points.append(seen(states, lanes)["point"])
    every = torch.stack(points, 1)
    values = vmap(vmap(valley))({"point": every})
    best = int(values[:, -STEPS // 4 :].mean(1).nan_to_num(torch.inf).argmin())
    return Path(RATES[best].item(), every[best].squeeze(-1), values[best])


def svg(found: Path, label: str) -> bytes:
    """The path over the valley's contours; text stays text, and the same path is the same file."""
    options = {"svg.fonttype": "none", "svg.hashsalt": "hbfunc", "font.family": "sans-serif", "path.simplify": False}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # points outside of the picture
        figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        x, y = torch.meshgrid(torch.linspace(-1.7, 1.7, 140), torch.linspace(-0.7, 2.2, 140), indexing="xy")
        values = vmap(lambda p: valley({"point": p}))(torch.stack([x.flatten(), y.flatten()], 1)).reshape(x.shape)
        axes.contour(x, y, values, levels=torch.logspace(-1.5, 1.8, 12).tolist(), colors="#c5cae9", linewidths=0.8)
        axes.plot(*found.points.T.tolist(), ".-", color="#3949ab", linewidth=1, markersize=4)
        axes.plot([START[0].item()], [START[1].item()], "o", color="#c62828", label="start")
        axes.plot([1], [1], "*", color="#2e7d32", markersize=12, label="optimum")
        axes.set(xlim=(-1.7, 1.7), ylim=(-0.7, 2.2), title=label)
        axes.legend(loc="lower left", frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
