"""The documented first-order classes. What their options mean is said in `hbfunc.recipes`."""

from __future__ import annotations

from typing import Any

from hbfunc import recipes
from hbfunc.optim.averaged import TrainEval
from hbfunc.optim.shim import StatefulOptimizer, use_default


class Moments(StatefulOptimizer):
    """The signature that AdamW, LaProp and MuonLaProp share."""

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
        *,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


def arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """params, foreach, seed and the rest as defaults, from the locals() of an __init__."""
    options = {k: v for k, v in scope.items() if k not in ("self", "__class__", "params", "foreach", "seed")}
    return {"params": scope["params"], "defaults": options, "foreach": scope["foreach"], "seed": scope["seed"]}


class ForeachAdamW(Moments):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    recipe = staticmethod(recipes.adamw)


class ForeachADOPT(StatefulOptimizer):
    """ADOPT (Taniguchi et al. 2024, arXiv 2411.02853), clipped as in its authors' code; see `hbfunc.adopt`."""

    recipe = staticmethod(recipes.adopt)

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
        *,
        clip_exp: float | None = 0.25,
        debias: bool = True,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class ForeachLaProp(Moments):
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839)."""

    recipe = staticmethod(recipes.laprop)


class _Averaged(StatefulOptimizer):
    """The signature that RMSprop and Schedule-Free AdamW share."""

    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: Any = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool = True,
        storage_dtype: str = "float32",
        mars: bool = False,
        caution: bool = False,
        mars_gamma: float = 0.0025,
        gradient_clipping: Any = use_default,
        update_clipping: Any = use_default,
        palm: Any = use_default,
        beta2_scale: float = 0.8,
        *,
        seed: int | None = None,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class ForeachRMSprop(_Averaged):
    """RMSprop (Hinton 2012), debiased and without momentum; r and weight_lr_power have no effect."""

    recipe = staticmethod(recipes.rmsprop)


class ForeachSFAdamW(_Averaged, TrainEval):
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682).

    Call `eval()` before evaluating or saving the model, and `train()` before training on, as with the authors' package.
    A model with BatchNorm needs `hbfunc.recompute_batchnorm` after `eval()`: its running statistics are those of y.
    """

    recipe = staticmethod(recipes.sfadamw)


class PaLMForeachSFAdamW(ForeachSFAdamW):
    """Schedule-Free AdamW with PaLM's beta2."""

    palm = True
