"""The documented torch.optim classes, over the stateful shim."""

from hbfunc.optim.first_order import (
    ForeachADOPT,
    ForeachAdamW,
    ForeachLaProp,
    ForeachRMSprop,
    ForeachSFAdamW,
    PaLMForeachSFAdamW,
)
from hbfunc.optim.shim import StatefulOptimizer, use_default

AdamW = ForeachAdamW
ADOPT = ForeachADOPT
LaProp = ForeachLaProp
RMSprop = ForeachRMSprop
SFAdamW = ForeachSFAdamW
PaLMSFAdamW = PaLMForeachSFAdamW

__all__ = [
    "ADOPT",
    "AdamW",
    "ForeachADOPT",
    "ForeachAdamW",
    "ForeachLaProp",
    "ForeachRMSprop",
    "ForeachSFAdamW",
    "LaProp",
    "PaLMForeachSFAdamW",
    "PaLMSFAdamW",
    "RMSprop",
    "SFAdamW",
    "StatefulOptimizer",
    "use_default",
]
