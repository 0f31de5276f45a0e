"""The documented classes with matrix preconditioners. What their options mean is said in `hbfunc.recipes`."""

from __future__ import annotations

from typing import Any

from hbfunc import recipes
from hbfunc.optim.curvature import WithCurvature
from hbfunc.optim.first_order import Moments, arguments
from hbfunc.optim.shim import StatefulOptimizer, use_default


class MuonLaProp(Moments):
    """LaProp, orthogonalized. `utils.zeroth_power_mode` chooses how: "newtonschulz" (also for "qr") or "svd"."""

    recipe = staticmethod(recipes.muon_laprop)


class ForeachMuon(StatefulOptimizer):
    """Muon (Jordan et al. 2024): orthogonalized momentum with decay betas[0]; betas[1] and eps are not used.

    `utils.zeroth_power_mode` chooses how: "newtonschulz" (also for "qr") or "svd".
    """

    recipe = staticmethod(recipes.muon)

    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: Any = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        foreach: bool = True,
        storage_dtype: str = "float32",
        mars: bool = False,
        caution: bool = False,
        mars_gamma: float = 0.0025,
        gradient_clipping: Any = use_default,
        update_clipping: Any = use_default,
        palm: Any = use_default,
        beta2_scale: float = 0.8,
        nesterov: bool = True,
        *,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class ForeachSOAP(StatefulOptimizer):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the slowly changing eigenbasis of Shampoo's factors."""

    recipe = staticmethod(recipes.soap)
    use_precond_schedule: bool = False

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: Any = (0.9, 0.95),
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
        warmup_steps: int = 1,
        split: bool = False,
        foreach: bool = True,
        mars: bool = False,
        caution: bool = False,
        mars_gamma: float = 0.0025,
        palm: Any = use_default,
        precond_scheduler: Any = (1 / 3, 9),
        beta2_scale: float = 0.8,
        use_precond_schedule: Any = use_default,
        gradient_clipping: Any = use_default,
        update_clipping: Any = use_default,
        *,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class PaLMForeachSOAP(ForeachSOAP):
    """SOAP with PaLM's beta2."""

    palm = True


class PrecondScheduleForeachSOAP(ForeachSOAP):
    """SOAP whose basis is refreshed ever more rarely, at random: see precond_scheduler."""

    use_precond_schedule = True


class PrecondSchedulePaLMForeachSOAP(PrecondScheduleForeachSOAP):
    """SOAP with PaLM's beta2 and ever rarer refreshes."""

    palm = True


class ForeachPSGDKron(WithCurvature):
    """PSGD with Kronecker-factored preconditioners (Li 2015, arXiv 1512.04202; 2024, arXiv 2402.04553).

    curvature: Newton's method. The factors are fitted on Hessian-vector products, which step(closure) takes from a
    closure that returns the loss and does not call backward(): `opt.step(lambda: loss_fn(model(x), y))`.
    """

    recipe = staticmethod(recipes.psgd_kron)
    update_clipping = "trust_region_clip_"
    delayed: bool = False
    cached: bool = False
    exp_avg_input: bool = True

    def __init__(
        self,
        params: Any,
        lr: Any = 0.001,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        preconditioner_update_probability: Any = None,
        max_size_triangular: int = 2048,
        min_ndim_triangular: int = 2,
        memory_save_mode: str | None = None,
        momentum_into_precond_update: bool = True,
        warmup_steps: int = 1,
        merge_dims: bool = False,
        split: bool = False,
        store_triu_as_line: bool = True,
        foreach: bool = True,
        q_dtype: str = "float32",
        stochastic_schedule: bool = True,
        storage_dtype: str = "float32",
        mars: bool = False,
        caution: bool = False,
        mars_gamma: float = 0.0025,
        delayed: Any = use_default,
        cached: Any = use_default,
        exp_avg_input: Any = use_default,
        gradient_clipping: Any = use_default,
        update_clipping: Any = use_default,
        precond_init_scale: float = 1.0,
        precond_lr: float = 0.1,
        *,
        curvature: bool = False,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class ForeachPurePSGD(ForeachPSGDKron):
    """PSGD-Kron without momentum."""

    exp_avg_input = False


class ForeachCachedDelayedPSGDKron(ForeachPSGDKron):
    """PSGD-Kron that applies the factors of the step before, from a cache of Q^T Q."""

    delayed = True
    cached = True


class ForeachCachedPSGDKron(ForeachPSGDKron):
    """PSGD-Kron with a cache of Q^T Q."""

    cached = True


class ForeachDelayedPSGD(ForeachPSGDKron):
    """PSGD-Kron that applies the factors of the step before."""

    delayed = True
