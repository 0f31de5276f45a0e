"""A thousand trainings at once: designs of hyperparameters, one vmapped and compiled step, results as arrays.

from hbfunc import sweep

tx = lambda lr, weight_decay: hbfunc.adamw(lr=lr, weight_decay=weight_decay)
design = sweep.sample(256, lr=sweep.log_uniform(1e-4, 1e-1), weight_decay=sweep.uniform(0, 0.1))
results = sweep.run(loss_fn, tx, params, design, batches, compile=True)
print(results.table())
results.heatmap("lr", "weight_decay")

designs     which hyperparameters each lane gets
modules     any nn.Module as a pure function, buffers and dropout included
engine      one lane's step, the same for K lanes, and the loop around it
memory      how many lanes fit
ranks       the same over several processes
data        batches of a lane's own: order, bootstrap, folds
searching   rounds of proposals, and successive halving
stopping    lanes that are good enough, or get no better
evolving    population-based training
results     arrays, tables and pictures of what the lanes did
"""

from hbfunc.sweep.data import LaneData
from hbfunc.sweep.designs import Design, design, grid, log_uniform, product, sample, uniform, zipped
from hbfunc.sweep.engine import init, vectorize
from hbfunc.sweep.evolving import Generation, evolve, population
from hbfunc.sweep.lane import Lane, Lanes, freeze, hyper, make_step, take, with_hyper
from hbfunc.sweep.modules import Functional, dropout, functional, seeded
from hbfunc.sweep.progress import Progress
from hbfunc.sweep.ranks import Share
from hbfunc.sweep.results import Best, Results, Spread
from hbfunc.sweep.running import Event, run, stream
from hbfunc.sweep.searching import Optuna, Proposer, halving, search
from hbfunc.sweep.stopping import early_stopping

__all__ = [
    "Best",
    "Design",
    "Event",
    "Functional",
    "Generation",
    "Lane",
    "LaneData",
    "Lanes",
    "Optuna",
    "Progress",
    "Proposer",
    "Results",
    "Share",
    "Spread",
    "design",
    "dropout",
    "early_stopping",
    "evolve",
    "freeze",
    "functional",
    "grid",
    "halving",
    "hyper",
    "init",
    "log_uniform",
    "make_step",
    "population",
    "product",
    "run",
    "sample",
    "search",
    "seeded",
    "stream",
    "take",
    "uniform",
    "vectorize",
    "with_hyper",
    "zipped",
]
