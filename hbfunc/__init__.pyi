"""Generated from the recipes by `python tests/stubs.py`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hbfunc.linalg.polar import Coefficients
from hbfunc.optimizers import adam as _adam, ademamix as _ademamix, lion as _lion, muon as _muon, nadamw as _nadamw, normuon as _normuon, prodigy as _prodigy, psgd as _psgd, schedule_free as _schedule_free, sgd as _sgd, soap as _soap
from hbfunc.pipeline import Betas, Clipping
from hbfunc.schedules import Number
from hbfunc.transforms.orthogonal import Count, Scale, Sizes

from hbfunc import chainable as chainable
from hbfunc import convert as convert
from hbfunc import distributed as distributed
from hbfunc import hypergrad as hypergrad
from hbfunc import random as random
from hbfunc import sweep as sweep
from hbfunc import testing as testing
from hbfunc import utils as utils
from hbfunc.batchnorm import recompute_batchnorm as recompute_batchnorm
from hbfunc.combinators import accumulate as accumulate
from hbfunc.combinators import caution as caution
from hbfunc.combinators import cautious as cautious
from hbfunc.combinators import ema_params as ema_params
from hbfunc.combinators import mars as mars
from hbfunc.combinators import mars_correction as mars_correction
from hbfunc.combinators import with_ema as with_ema
from hbfunc.combinators import with_hyperparameters as with_hyperparameters
from hbfunc.contract import Transform as Transform
from hbfunc.contract import apply_updates as apply_updates
from hbfunc.contract import chain as chain
from hbfunc.contract import stateless as stateless
from hbfunc.contract import transform as transform
from hbfunc.nonfinite import apply_if_finite as apply_if_finite
from hbfunc.nonfinite import apply_to_finite_leaves as apply_to_finite_leaves
from hbfunc.nonfinite import skipped_steps as skipped_steps
from hbfunc.optim.wrapped import FromTransform as FromTransform
from hbfunc.optimizers.partitioned import MatricesTo as MatricesTo
from hbfunc.optimizers.partitioned import embeddings_and_head as embeddings_and_head
from hbfunc.optimizers.partitioned import matrices_to as matrices_to
from hbfunc.optimizers.split import SplitOpt as SplitOpt
from hbfunc.partitions import freeze as freeze
from hbfunc.partitions import masked as masked
from hbfunc.partitions import partition as partition
from hbfunc.precision import round_to_parameters as round_to_parameters
from hbfunc.precision import with_storage as with_storage
from hbfunc.presence import with_presence as with_presence
from hbfunc.schedules import palm_beta2 as palm_beta2
from hbfunc.schedules import warmup as warmup
from hbfunc.transforms.adaptive import scale_by_adam as scale_by_adam
from hbfunc.transforms.adaptive import scale_by_adopt as scale_by_adopt
from hbfunc.transforms.adaptive import scale_by_exp_avg_sq as scale_by_exp_avg_sq
from hbfunc.transforms.adaptive import scale_by_laprop as scale_by_laprop
from hbfunc.transforms.clipping import a_law_compress as a_law_compress
from hbfunc.transforms.clipping import clip_by as clip_by
from hbfunc.transforms.clipping import identity as identity
from hbfunc.transforms.clipping import l2_clip as l2_clip
from hbfunc.transforms.clipping import mu_law_compress as mu_law_compress
from hbfunc.transforms.clipping import rmsnorm_clip as rmsnorm_clip
from hbfunc.transforms.clipping import trust_region_clip as trust_region_clip
from hbfunc.transforms.momentum import exp_avg as exp_avg
from hbfunc.transforms.momentum import heavyball_momentum as heavyball_momentum
from hbfunc.transforms.momentum import nesterov_momentum as nesterov_momentum
from hbfunc.transforms.orthogonal import orthogonalize as orthogonalize
from hbfunc.transforms.psgd import scale_by_psgd as scale_by_psgd
from hbfunc.transforms.schedule_free import schedule_free as schedule_free
from hbfunc.transforms.schedule_free import schedule_free_eval_params as schedule_free_eval_params
from hbfunc.transforms.schedule_free import schedule_free_train_params as schedule_free_train_params
from hbfunc.transforms.soap import scale_by_soap as scale_by_soap
from hbfunc.transforms.steps import add_decayed_weights as add_decayed_weights
from hbfunc.transforms.steps import scale as scale
from hbfunc.transforms.steps import scale_by_learning_rate as scale_by_learning_rate
from hbfunc.transforms.steps import set_to_zero as set_to_zero

__version__: str
__all__: list[str]

def adamw(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def ademamix(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., *, alpha: Number = ..., warmup_alpha: int = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def adopt(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, caution_scaling: bool = ..., seed: int | Tensor = ..., clip_exp: float | Tensor | None = ..., debias: bool = ...) -> Transform: ...
def laprop(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def lion(lr: Number = ..., betas: Betas = ..., weight_decay: Number = ..., *, warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def muon(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., nesterov: bool = ..., *, caution_scaling: bool = ..., seed: int | Tensor = ..., orthogonalizer: str = ..., scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ...) -> Transform: ...
def muon_laprop(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, caution_scaling: bool = ..., seed: int | Tensor = ..., orthogonalizer: str = ..., scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ...) -> Transform: ...
def nadamw(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., *, momentum_decay: float | Tensor | None = ..., add_eps: bool = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def normuon(lr: Number = ..., betas: Betas = ..., weight_decay: Number = ..., *, nesterov: bool = ..., orthogonalizer: str = ..., scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def prodigy(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., *, d0: float | Tensor = ..., d_coef: float | Tensor = ..., growth_rate: float | Tensor | None = ..., bias_correction: bool = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def psgd_kron(lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: bool = ..., cached: bool = ..., exp_avg_input: bool = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def rmsprop(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., r: float | Tensor = ..., weight_lr_power: float | Tensor = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def sfadamw(lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., r: float | Tensor = ..., weight_lr_power: float | Tensor = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., palm: bool = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., caution_scaling: bool = ..., seed: int | Tensor = ..., largest_rate: bool = ...) -> Transform: ...
def sgd(lr: Number = ..., momentum: Number = ..., weight_decay: Number = ..., *, nesterov: bool = ..., dampening: float | Tensor = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., caution_scaling: bool = ..., seed: int | Tensor = ...) -> Transform: ...
def soap(lr: Number = ..., betas: Betas = ..., shampoo_beta: Number = ..., eps: float | Tensor = ..., weight_decay: Number = ..., precondition_frequency: int | Tensor = ..., max_precond_dim: int = ..., merge_dims: bool = ..., precondition_1d: bool = ..., normalize_grads: bool = ..., data_format: str = ..., correct_bias: bool = ..., warmup_steps: int = ..., split: bool = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., palm: bool = ..., precond_scheduler: Sequence[float] = ..., beta2_scale: float | Tensor = ..., use_precond_schedule: bool = ..., gradient_clipping: Clipping = ..., update_clipping: Clipping = ..., *, inner: str = ..., stop_gradient: bool = ..., refresh_phase: int = ..., seed: int | Tensor = ..., caution_scaling: bool = ...) -> Transform: ...
class ForeachAdamW(_adam.ForeachAdamW):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachADOPT(_adam.ForeachADOPT):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, clip_exp: float | Tensor | None = ..., debias: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachLaProp(_adam.ForeachLaProp):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachRMSprop(_adam.ForeachRMSprop):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., r: float | Tensor = ..., weight_lr_power: float | Tensor = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class AdEMAMix(_ademamix.AdEMAMix):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., foreach: bool = ..., *, alpha: Number = ..., warmup_alpha: int = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class Lion(_lion.Lion):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., weight_decay: Number = ..., foreach: bool = ..., *, warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachMuon(_muon.ForeachMuon):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., nesterov: bool = ..., *, scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class MuonLaProp(_muon.MuonLaProp):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class NAdamW(_nadamw.NAdamW):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., foreach: bool = ..., *, momentum_decay: float | Tensor | None = ..., add_eps: bool = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class NorMuon(_normuon.NorMuon):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., weight_decay: Number = ..., foreach: bool = ..., *, nesterov: bool = ..., scale: Scale = ..., batch_dims: Count = ..., heads: Count = ..., split_sizes: Sizes = ..., steps: int | None = ..., coefficients: str | Coefficients | None = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class Prodigy(_prodigy.Prodigy):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., foreach: bool = ..., *, d0: float | Tensor = ..., d_coef: float | Tensor = ..., growth_rate: float | Tensor | None = ..., bias_correction: bool = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachCachedDelayedPSGDKron(_psgd.ForeachCachedDelayedPSGDKron):
    def __init__(self, params: ParamsT, lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., foreach: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: Any = ..., cached: Any = ..., exp_avg_input: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachCachedPSGDKron(_psgd.ForeachCachedPSGDKron):
    def __init__(self, params: ParamsT, lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., foreach: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: Any = ..., cached: Any = ..., exp_avg_input: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachDelayedPSGD(_psgd.ForeachDelayedPSGD):
    def __init__(self, params: ParamsT, lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., foreach: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: Any = ..., cached: Any = ..., exp_avg_input: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachPSGDKron(_psgd.ForeachPSGDKron):
    def __init__(self, params: ParamsT, lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., foreach: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: Any = ..., cached: Any = ..., exp_avg_input: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachPurePSGD(_psgd.ForeachPurePSGD):
    def __init__(self, params: ParamsT, lr: Number = ..., beta: Number = ..., weight_decay: Number = ..., preconditioner_update_probability: Number | None = ..., max_size_triangular: int = ..., min_ndim_triangular: int = ..., memory_save_mode: str | None = ..., momentum_into_precond_update: bool = ..., warmup_steps: int = ..., merge_dims: bool = ..., split: bool = ..., store_triu_as_line: bool = ..., foreach: bool = ..., q_dtype: str = ..., stochastic_schedule: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., delayed: Any = ..., cached: Any = ..., exp_avg_input: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., precond_init_scale: float | Tensor = ..., precond_lr: float | Tensor = ..., *, curvature: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachSFAdamW(_schedule_free.ForeachSFAdamW):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., r: float | Tensor = ..., weight_lr_power: float | Tensor = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., largest_rate: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class PaLMForeachSFAdamW(_schedule_free.PaLMForeachSFAdamW):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., eps: float | Tensor = ..., weight_decay: Number = ..., warmup_steps: int = ..., r: float | Tensor = ..., weight_lr_power: float | Tensor = ..., foreach: bool = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., palm: Any = ..., beta2_scale: float | Tensor = ..., *, add_eps: bool = ..., largest_rate: bool = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class SGD(_sgd.SGD):
    def __init__(self, params: ParamsT, lr: Number = ..., momentum: Number = ..., weight_decay: Number = ..., foreach: bool = ..., *, nesterov: bool = ..., dampening: float | Tensor = ..., warmup_steps: int = ..., storage_dtype: str = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class ForeachSOAP(_soap.ForeachSOAP):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., shampoo_beta: Number = ..., eps: float | Tensor = ..., weight_decay: Number = ..., precondition_frequency: int | Tensor = ..., max_precond_dim: int = ..., merge_dims: bool = ..., precondition_1d: bool = ..., normalize_grads: bool = ..., data_format: str = ..., correct_bias: bool = ..., warmup_steps: int = ..., split: bool = ..., foreach: bool = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., palm: Any = ..., precond_scheduler: Sequence[float] = ..., beta2_scale: float | Tensor = ..., use_precond_schedule: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., *, inner: str = ..., refresh_phase: int = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class PaLMForeachSOAP(_soap.PaLMForeachSOAP):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., shampoo_beta: Number = ..., eps: float | Tensor = ..., weight_decay: Number = ..., precondition_frequency: int | Tensor = ..., max_precond_dim: int = ..., merge_dims: bool = ..., precondition_1d: bool = ..., normalize_grads: bool = ..., data_format: str = ..., correct_bias: bool = ..., warmup_steps: int = ..., split: bool = ..., foreach: bool = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., palm: Any = ..., precond_scheduler: Sequence[float] = ..., beta2_scale: float | Tensor = ..., use_precond_schedule: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., *, inner: str = ..., refresh_phase: int = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class PrecondScheduleForeachSOAP(_soap.PrecondScheduleForeachSOAP):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., shampoo_beta: Number = ..., eps: float | Tensor = ..., weight_decay: Number = ..., precondition_frequency: int | Tensor = ..., max_precond_dim: int = ..., merge_dims: bool = ..., precondition_1d: bool = ..., normalize_grads: bool = ..., data_format: str = ..., correct_bias: bool = ..., warmup_steps: int = ..., split: bool = ..., foreach: bool = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., palm: Any = ..., precond_scheduler: Sequence[float] = ..., beta2_scale: float | Tensor = ..., use_precond_schedule: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., *, inner: str = ..., refresh_phase: int = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
class PrecondSchedulePaLMForeachSOAP(_soap.PrecondSchedulePaLMForeachSOAP):
    def __init__(self, params: ParamsT, lr: Number = ..., betas: Betas = ..., shampoo_beta: Number = ..., eps: float | Tensor = ..., weight_decay: Number = ..., precondition_frequency: int | Tensor = ..., max_precond_dim: int = ..., merge_dims: bool = ..., precondition_1d: bool = ..., normalize_grads: bool = ..., data_format: str = ..., correct_bias: bool = ..., warmup_steps: int = ..., split: bool = ..., foreach: bool = ..., mars: bool = ..., caution: bool = ..., mars_gamma: float | Tensor = ..., palm: Any = ..., precond_scheduler: Sequence[float] = ..., beta2_scale: float | Tensor = ..., use_precond_schedule: Any = ..., gradient_clipping: Any = ..., update_clipping: Any = ..., *, inner: str = ..., refresh_phase: int = ..., seed: int | None = ..., nonfinite: str = ..., consume_grad: bool | None = ...) -> None: ...
ADOPT = ForeachADOPT
AdamW = ForeachAdamW
LaProp = ForeachLaProp
RMSprop = ForeachRMSprop
Muon = ForeachMuon
NAdam = NAdamW
CachedDelayedPSGDKron = ForeachCachedDelayedPSGDKron
CachedPSGDKron = ForeachCachedPSGDKron
DelayedPSGD = ForeachDelayedPSGD
PSGDKron = ForeachPSGDKron
PurePSGD = ForeachPurePSGD
PaLMSFAdamW = PaLMForeachSFAdamW
SFAdamW = ForeachSFAdamW
SOAP = ForeachSOAP
PaLMSOAP = PaLMForeachSOAP
PrecondSchedulePaLMSOAP = PrecondSchedulePaLMForeachSOAP
PrecondScheduleSOAP = PrecondScheduleForeachSOAP
