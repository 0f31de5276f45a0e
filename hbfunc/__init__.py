"""hbfunc: HeavyBall's documented optimizers as pure, functional transforms and as drop-in torch.optim classes."""

from hbfunc.combinators import (
    accumulate,
    apply_if_finite,
    caution,
    cautious,
    mars,
    mars_correction,
    masked,
    partition,
    with_ema,
    with_hyperparameters,
)
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.recipes import adamw, adopt, laprop, matrices_to, muon, muon_laprop, rmsprop, sfadamw, soap
from hbfunc.schedules import palm_beta2, warmup
from hbfunc.transform import Transform, apply_updates, chain, stateless, transform
from hbfunc.transforms.adaptive import scale_by_adam, scale_by_adopt, scale_by_exp_avg_sq, scale_by_laprop
from hbfunc.transforms.clipping import (
    a_law_compress,
    clip_by,
    identity,
    l2_clip,
    mu_law_compress,
    rmsnorm_clip,
    trust_region_clip,
)
from hbfunc.transforms.momentum import exp_avg, heavyball_momentum, nesterov_momentum
from hbfunc.transforms.orthogonal import orthogonalize
from hbfunc.transforms.schedule_free import schedule_free, schedule_free_eval_params, schedule_free_train_params
from hbfunc.transforms.soap import scale_by_soap
from hbfunc.transforms.steps import add_decayed_weights, scale_by_learning_rate

__version__ = "0.1.0"

__all__ = [
    "Transform",
    "a_law_compress",
    "accumulate",
    "adamw",
    "add_decayed_weights",
    "adopt",
    "apply_if_finite",
    "apply_updates",
    "caution",
    "cautious",
    "chain",
    "clip_by",
    "exp_avg",
    "heavyball_momentum",
    "identity",
    "l2_clip",
    "laprop",
    "mars",
    "mars_correction",
    "masked",
    "matrices_to",
    "mu_law_compress",
    "muon",
    "muon_laprop",
    "nesterov_momentum",
    "orthogonalize",
    "palm_beta2",
    "partition",
    "rmsnorm_clip",
    "rmsprop",
    "round_to_parameters",
    "scale_by_adam",
    "scale_by_adopt",
    "scale_by_exp_avg_sq",
    "scale_by_laprop",
    "scale_by_learning_rate",
    "scale_by_soap",
    "schedule_free",
    "schedule_free_eval_params",
    "schedule_free_train_params",
    "sfadamw",
    "soap",
    "stateless",
    "transform",
    "trust_region_clip",
    "warmup",
    "with_ema",
    "with_hyperparameters",
    "with_storage",
]
