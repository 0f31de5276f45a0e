"""Keywords of HeavyBall 3: the options of hbfunc that they mean, and for missing ones the nearest thing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hbfunc.forms import short
from hbfunc.optim.groups import use_default
from hbfunc.pipeline import check_flags

_MATRICES = "hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(...), rest=hbfunc.adamw(...))"
NEAREST = {  # what HeavyBall 3 has at its top and hbfunc has not
    "UnscaledAdamW": "hbfunc.AdamW",
    "SUDSAdamW": "hbfunc.PSGDKron, or hbfunc.SOAP",
    "Scion": "hbfunc.Muon",
    "AdamC": 'hbfunc.AdamW, with decay="adamc"',
    "HyperBallAdamW": "hbfunc.AdamW, with hyperball=True",
    "MuonAdamW": _MATRICES,
    "MSAMLaProp": "hbfunc.LaProp",
    "SOAPNAdam": 'hbfunc.SOAP, with inner="nadam"',
    "SOAPAdEMAMix": 'hbfunc.SOAP, with inner="ademamix"',
    "HeavySOAP": "hbfunc.SOAP, whose moments move with the basis",
    "HeavyKLSOAP": "hbfunc.KLSOAP",
    "HeavyKLShampoo": "hbfunc.KLShampoo",
    "HeavySOAPNAdam": 'hbfunc.SOAP, with inner="nadam"',
    "HeavySOAPAdEMAMix": 'hbfunc.SOAP, with inner="ademamix"',
    "HeavySOLP": "hbfunc.SOLP",
    "LaPropOrtho": "hbfunc.OrthoLaProp",
    "LATHER": "hbfunc.PSGDKron",
    "QSGD": "hbfunc.PSGDPRO",
    "PSGDLRA": "hbfunc.PSGDKron",
    "SAMWrapper": "a closure that moves the parameters before its second gradient, with any class of hbfunc",
    "capture_param_shapes": "nothing: FSDP2's parameters know their shapes",
}
_SETTINGS = ("compile_step", "promote")  # of an optimizer, not of its groups
_OFF = {  # options there and not here, and the value at which they do nothing; and what is nearest to them, if anything
    "ecc": (None, 'storage_dtype="bfloat16", stochastically rounded'),
    "param_ecc": (None, "bfloat16 parameters, which are rounded stochastically"),
    "orig_shapes": (None, "FSDP2, whose parameters know their shapes"),
    "storage_dtype": ("float32", ""),
    "precond_grad_accum": (False, ""),
    "palm": (False, ""),
    "beta2_scale": (0.8, ""),
    "lower_bound_beta": (0.9, ""),
    "dampening": (1e-9, ""),
    "init_factor": (0.1, ""),
    "precond_update_power_iterations": (2, ""),
    "precond_init_scale": (None, "a number"),
    "precond_init_scale_scale": (1, "precond_init_scale"),
    "precond_init_scale_power": (None, "precond_init_scale"),
    "finite_differences": (False, ""),
    "fallback_to_finite_differences": (True, ""),
    "hvp_interval": (1, ""),
    "hessian_approx": (False, "hbfunc.FromTransform(..., curvature=True)"),
}


def translated(given: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate keywords of HeavyBall 3 to those of a class with the options `known`, and settings of the optimizer.

    Raises TypeError, naming the nearest thing, for an option that is on and has no counterpart.
    """
    options = dict(given)
    settings = {k: options.pop(k) for k in _SETTINGS if k in options}
    if "multi_tensor" in options:
        if "foreach" in options:
            raise TypeError("multi_tensor is another name of foreach: expected one of them")
        options["foreach"] = options.pop("multi_tensor")
    if "beta" in options and "momentum" in known:  # of SGD
        options["momentum"] = options.pop("beta")
    if "betas" in options and "beta" in known:  # of PSGD, in either spelling
        betas = options.pop("betas")
        if options.get("beta") is None and isinstance(betas, Sequence) and betas:
            options["beta"] = betas[0]
    if "heavyball_momentum" in options and "nesterov" in known:
        del options["heavyball_momentum"]  # the length of a momentum that is orthogonalized does not matter
    coupled = not options.pop("decoupled_weight_decay", True)
    if coupled and options.get("weight_decay"):
        raise TypeError("decoupled_weight_decay=False: expected True, hbfunc's weight decay is not in the gradient")
    ramps = [options.pop(name) for name in ("beta3_warmup", "alpha_warmup") if name in options]
    if any(ramps):
        if "warmup_alpha" not in known or len(set(ramps)) > 1:
            raise TypeError(f"beta3_warmup and alpha_warmup are {short(ramps)}: expected one number, as warmup_alpha")
        options["warmup_alpha"] = ramps[0]
    for name, (off, nearest) in _OFF.items():
        if name not in options:
            continue
        if options[name] in (off, use_default) and (name not in known or options[name] is None):
            del options[name]
        elif name not in known:
            what = f"unexpected keyword argument {name!r}: {name}={short(options[name])}: expected {off!r}"
            raise TypeError(f"{what}; nearest: {nearest}" if nearest else what)
    settings = {k: v for k, v in settings.items() if v is not use_default}
    check_flags(**settings)
    return options, settings
