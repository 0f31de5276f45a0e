"""The documented torch.optim classes, over the stateful shim."""

from hbfunc.optim.first_order import (
    ForeachAdamW,
    ForeachADOPT,
    ForeachLaProp,
    ForeachRMSprop,
    ForeachSFAdamW,
    PaLMForeachSFAdamW,
)
from hbfunc.optim.matrix import (
    ForeachCachedDelayedPSGDKron,
    ForeachCachedPSGDKron,
    ForeachDelayedPSGD,
    ForeachMuon,
    ForeachPSGDKron,
    ForeachPurePSGD,
    ForeachSOAP,
    MuonLaProp,
    PaLMForeachSOAP,
    PrecondScheduleForeachSOAP,
    PrecondSchedulePaLMForeachSOAP,
)
from hbfunc.optim.shim import StatefulOptimizer, use_default
from hbfunc.optim.wrapped import FromTransform, MatricesTo

AdamW = ForeachAdamW
RMSprop = ForeachRMSprop
SFAdamW = ForeachSFAdamW
PaLMSFAdamW = PaLMForeachSFAdamW
ADOPT = ForeachADOPT
Muon = ForeachMuon
LaProp = ForeachLaProp
SOAP = ForeachSOAP
PaLMSOAP = PaLMForeachSOAP
PrecondScheduleSOAP = PrecondScheduleForeachSOAP
PrecondSchedulePaLMSOAP = PrecondSchedulePaLMForeachSOAP
PSGDKron = ForeachPSGDKron
PurePSGD = ForeachPurePSGD
DelayedPSGD = ForeachDelayedPSGD
CachedPSGDKron = ForeachCachedPSGDKron
CachedDelayedPSGDKron = ForeachCachedDelayedPSGDKron

__all__ = [
    "ADOPT",
    "SOAP",
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
    "LaProp",
    "MatricesTo",
    "Muon",
    "MuonLaProp",
    "PSGDKron",
    "PaLMForeachSFAdamW",
    "PaLMForeachSOAP",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondScheduleForeachSOAP",
    "PrecondSchedulePaLMForeachSOAP",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleSOAP",
    "PurePSGD",
    "RMSprop",
    "SFAdamW",
    "StatefulOptimizer",
    "use_default",
]
