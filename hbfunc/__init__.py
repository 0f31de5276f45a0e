"""hbfunc: HeavyBall's documented optimizers as pure, functional transforms and as drop-in torch.optim classes."""

import sys

from hbfunc import chainable, convert, distributed, hypergrad, random, sweep, testing, utils
from hbfunc.batchnorm import recompute_batchnorm
from hbfunc.combinators import (
    accumulate,
    caution,
    cautious,
    ema_params,
    mars,
    mars_correction,
    with_ema,
    with_hyperparameters,
)
from hbfunc.contract import Transform, apply_updates, chain, stateless, transform
from hbfunc.nonfinite import apply_if_finite, apply_to_finite_leaves, skipped_steps
from hbfunc.optim.wrapped import FromTransform
from hbfunc.optimizers.adam import (
    ADOPT,
    AdamW,
    ForeachAdamW,
    ForeachADOPT,
    ForeachLaProp,
    ForeachRMSprop,
    LaProp,
    RMSprop,
    adamw,
    adopt,
    laprop,
    rmsprop,
)
from hbfunc.optimizers.ademamix import AdEMAMix, ademamix
from hbfunc.optimizers.lion import Lion, lion
from hbfunc.optimizers.muon import ForeachMuon, Muon, MuonLaProp, muon, muon_laprop
from hbfunc.optimizers.nadamw import NAdam, NAdamW, nadamw
from hbfunc.optimizers.normuon import NorMuon, normuon
from hbfunc.optimizers.ortho_laprop import OrthoLaProp, ortho_laprop
from hbfunc.optimizers.partitioned import MatricesTo, embeddings_and_head, matrices_to
from hbfunc.optimizers.prodigy import Prodigy, prodigy
from hbfunc.optimizers.psgd import (
    PSGDPRO,
    CachedDelayedPSGDKron,
    CachedPSGDKron,
    DelayedPSGD,
    ForeachCachedDelayedPSGDKron,
    ForeachCachedPSGDKron,
    ForeachDelayedPSGD,
    ForeachPSGDKron,
    ForeachPurePSGD,
    PSGDKron,
    PurePSGD,
    psgd_kron,
    psgd_pro,
)
from hbfunc.optimizers.schedule_free import (
    SFSGD,
    ForeachSFAdamW,
    PaLMForeachSFAdamW,
    PaLMSFAdamW,
    SFAdamW,
    sfadamw,
    sfsgd,
)
from hbfunc.optimizers.sgd import SGD, sgd
from hbfunc.optimizers.shampoo import KLShampoo, Shampoo, kl_shampoo, shampoo
from hbfunc.optimizers.sign_laprop import SignLaProp, sign_laprop
from hbfunc.optimizers.soap import (
    KLSOAP,
    SOAP,
    SOLP,
    ForeachSOAP,
    PaLMForeachSOAP,
    PaLMSOAP,
    PrecondScheduleForeachSOAP,
    PrecondSchedulePaLMForeachSOAP,
    PrecondSchedulePaLMSOAP,
    PrecondScheduleSOAP,
    soap,
)
from hbfunc.optimizers.split import SplitOpt
from hbfunc.partitions import freeze, masked, partition
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.presence import with_presence
from hbfunc.schedules import palm_beta2, warmup
from hbfunc.transforms.adaptive import scale_by_adam, scale_by_adopt, scale_by_exp_avg_sq, scale_by_laprop
from hbfunc.transforms.by_loss import polyak_step, reduce_on_plateau
from hbfunc.transforms.clipping import (
    a_law_compress,
    clip_by,
    identity,
    l2_clip,
    mu_law_compress,
    rmsnorm_clip,
    trust_region_clip,
)
from hbfunc.transforms.hyperball import hyperball
from hbfunc.transforms.lookahead import lookahead
from hbfunc.transforms.momentum import exp_avg, heavyball_momentum, nesterov_momentum
from hbfunc.transforms.norms import adaptive_gradient_clip, clip_by_global_norm
from hbfunc.transforms.orthogonal import orthogonalize
from hbfunc.transforms.orthograd import orthograd
from hbfunc.transforms.psgd import scale_by_psgd
from hbfunc.transforms.schedule_free import gpa, schedule_free, schedule_free_eval_params, schedule_free_train_params
from hbfunc.transforms.soap import scale_by_soap
from hbfunc.transforms.steps import (
    add_decayed_weights,
    no_decay_for_vectors,
    scale,
    scale_by_learning_rate,
    set_to_zero,
)

__version__ = "0.1.0"

__all__ = [
    "ADOPT",
    "KLSOAP",
    "PSGDPRO",
    "SFSGD",
    "SGD",
    "SOAP",
    "SOLP",
    "AdEMAMix",
    "AdamW",
    "CachedDelayedPSGDKron",
    "CachedPSGDKron",
    "DelayedPSGD",
    "ForeachADOPT",
    "ForeachAdamW",
    "ForeachCachedDelayedPSGDKron",
    "ForeachCachedPSGDKron",
    "ForeachDelayedPSGD",
    "ForeachLaProp",
    "ForeachMuon",
    "ForeachPSGDKron",
    "ForeachPurePSGD",
    "ForeachRMSprop",
    "ForeachSFAdamW",
    "ForeachSOAP",
    "FromTransform",
    "KLShampoo",
    "LaProp",
    "Lion",
    "MatricesTo",
    "Muon",
    "MuonLaProp",
    "NAdam",
    "NAdamW",
    "NorMuon",
    "OrthoLaProp",
    "PSGDKron",
    "PaLMForeachSFAdamW",
    "PaLMForeachSOAP",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondScheduleForeachSOAP",
    "PrecondSchedulePaLMForeachSOAP",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleSOAP",
    "Prodigy",
    "PurePSGD",
    "RMSprop",
    "SFAdamW",
    "Shampoo",
    "SignLaProp",
    "SplitOpt",
    "Transform",
    "a_law_compress",
    "accumulate",
    "adamw",
    "adaptive_gradient_clip",
    "add_decayed_weights",
    "ademamix",
    "adopt",
    "apply_if_finite",
    "apply_to_finite_leaves",
    "apply_updates",
    "caution",
    "cautious",
    "chain",
    "chainable",
    "clip_by",
    "clip_by_global_norm",
    "convert",
    "distributed",
    "ema_params",
    "embeddings_and_head",
    "exp_avg",
    "freeze",
    "gpa",
    "heavyball_momentum",
    "hyperball",
    "hypergrad",
    "identity",
    "kl_shampoo",
    "l2_clip",
    "laprop",
    "lion",
    "lookahead",
    "mars",
    "mars_correction",
    "masked",
    "matrices_to",
    "mu_law_compress",
    "muon",
    "muon_laprop",
    "nadamw",
    "nesterov_momentum",
    "no_decay_for_vectors",
    "normuon",
    "ortho_laprop",
    "orthogonalize",
    "orthograd",
    "palm_beta2",
    "partition",
    "polyak_step",
    "prodigy",
    "psgd_kron",
    "psgd_pro",
    "random",
    "recompute_batchnorm",
    "reduce_on_plateau",
    "rmsnorm_clip",
    "rmsprop",
    "round_to_parameters",
    "scale",
    "scale_by_adam",
    "scale_by_adopt",
    "scale_by_exp_avg_sq",
    "scale_by_laprop",
    "scale_by_learning_rate",
    "scale_by_psgd",
    "scale_by_soap",
    "schedule_free",
    "schedule_free_eval_params",
    "schedule_free_train_params",
    "set_to_zero",
    "sfadamw",
    "sfsgd",
    "sgd",
    "shampoo",
    "sign_laprop",
    "skipped_steps",
    "soap",
    "stateless",
    "sweep",
    "testing",
    "transform",
    "trust_region_clip",
    "utils",
    "warmup",
    "with_ema",
    "with_hyperparameters",
    "with_presence",
    "with_storage",
]


def __getattr__(name: str) -> object:
    """Raise AttributeError; for what HeavyBall 3 has and hbfunc has not, with the nearest thing. Python adds the name
    that is most alike."""
    from hbfunc.optimizers.heavyball3 import NEAREST

    more = f": HeavyBall 3 has it, hbfunc has not; nearest: {NEAREST[name]}" if name in NEAREST else ""
    raise AttributeError(f"module 'hbfunc' has no attribute {name!r}{more}", name=name, obj=sys.modules[__name__])
