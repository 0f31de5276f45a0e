"""The documented names, signatures and defaults, copied from the documentation: a promise to users."""

from __future__ import annotations

import inspect

import pytest
import stubs

import hbfunc
import hbfunc as heavyball
from hbfunc import chainable as C

_FIRST = """params, lr=0.0025, betas=(0.9, 0.99), eps=1e-08, weight_decay=0, warmup_steps=0, foreach=True,
    storage_dtype='float32', mars=False, caution=False, mars_gamma=0.0025, gradient_clipping=C.use_default,
    update_clipping=C.use_default, palm=C.use_default, beta2_scale=0.8"""
_AVERAGED = """params, lr=0.0025, betas=(0.9, 0.99), eps=1e-06, weight_decay=0, warmup_steps=0, r=0.0,
    weight_lr_power=2.0, foreach=True, storage_dtype='float32', mars=False, caution=False, mars_gamma=0.0025,
    gradient_clipping=C.use_default, update_clipping=C.use_default, palm=C.use_default, beta2_scale=0.8"""
_SOAP = """params, lr=0.003, betas=(0.9, 0.95), shampoo_beta=0.95, eps=1e-08, weight_decay=0.01,
    precondition_frequency=2, max_precond_dim=2048, merge_dims=True, precondition_1d=False, normalize_grads=False,
    data_format='channels_first', correct_bias=True, warmup_steps=1, split=False, foreach=True, mars=False,
    caution=False, mars_gamma=0.0025, palm=C.use_default, precond_scheduler=(1/3, 9), beta2_scale=0.8,
    use_precond_schedule=C.use_default, gradient_clipping=C.use_default, update_clipping=C.use_default"""
_PSGD = """params, lr=0.001, beta=0.9, weight_decay=0.0, preconditioner_update_probability=None,
    max_size_triangular=2048, min_ndim_triangular=2, memory_save_mode=None, momentum_into_precond_update=True,
    warmup_steps=1, merge_dims=False, split=False, store_triu_as_line=True, foreach=True, q_dtype='float32',
    stochastic_schedule=True, storage_dtype='float32', mars=False, caution=False, mars_gamma=0.0025,
    delayed=C.use_default, cached=C.use_default, exp_avg_input=C.use_default, gradient_clipping=C.use_default,
    update_clipping=C.use_default, precond_init_scale=1.0, precond_lr=0.1"""

CLASSES = {
    **dict.fromkeys(["ForeachAdamW", "ForeachADOPT", "ForeachLaProp", "MuonLaProp"], _FIRST),
    **dict.fromkeys(["ForeachRMSprop", "ForeachSFAdamW", "PaLMForeachSFAdamW"], _AVERAGED),
    "ForeachMuon": _FIRST + ", nesterov=True",
    **dict.fromkeys(
        ["ForeachSOAP", "PaLMForeachSOAP", "PrecondScheduleForeachSOAP", "PrecondSchedulePaLMForeachSOAP"], _SOAP
    ),
    **dict.fromkeys(
        [
            "ForeachPSGDKron",
            "ForeachPurePSGD",
            "ForeachCachedDelayedPSGDKron",
            "ForeachCachedPSGDKron",
            "ForeachDelayedPSGD",
        ],
        _PSGD,
    ),
}
RECIPES = {
    "adamw": "ForeachAdamW",
    "rmsprop": "ForeachRMSprop",
    "sfadamw": "ForeachSFAdamW",
    "adopt": "ForeachADOPT",
    "muon": "ForeachMuon",
    "laprop": "ForeachLaProp",
    "muon_laprop": "MuonLaProp",
    "soap": "ForeachSOAP",
    "psgd_kron": "ForeachPSGDKron",
}
SHORT = {
    "AdamW": "ForeachAdamW",
    "RMSprop": "ForeachRMSprop",
    "SFAdamW": "ForeachSFAdamW",
    "PaLMSFAdamW": "PaLMForeachSFAdamW",
    "ADOPT": "ForeachADOPT",
    "Muon": "ForeachMuon",
    "LaProp": "ForeachLaProp",
    "SOAP": "ForeachSOAP",
    "PaLMSOAP": "PaLMForeachSOAP",
    "PrecondScheduleSOAP": "PrecondScheduleForeachSOAP",
    "PrecondSchedulePaLMSOAP": "PrecondSchedulePaLMForeachSOAP",
    "PSGDKron": "ForeachPSGDKron",
    "PurePSGD": "ForeachPurePSGD",
    "DelayedPSGD": "ForeachDelayedPSGD",
    "CachedPSGDKron": "ForeachCachedPSGDKron",
    "CachedDelayedPSGDKron": "ForeachCachedDelayedPSGDKron",
}
ATTRIBUTES = {
    "PaLMForeachSFAdamW": {"palm": True},
    "ForeachSOAP": {"use_precond_schedule": False, "palm": False},
    "PaLMForeachSOAP": {"use_precond_schedule": False, "palm": True},
    "PrecondScheduleForeachSOAP": {"use_precond_schedule": True},
    "PrecondSchedulePaLMForeachSOAP": {"use_precond_schedule": True, "palm": True},
    "ForeachPSGDKron": {"delayed": False, "cached": False, "exp_avg_input": True},
    "ForeachPurePSGD": {"exp_avg_input": False},
    "ForeachCachedDelayedPSGDKron": {"delayed": True, "cached": True},
    "ForeachCachedPSGDKron": {"cached": True},
    "ForeachDelayedPSGD": {"delayed": True},
    "ForeachAdamW": {"gradient_clipping": None, "update_clipping": None, "palm": False},
}
CHAINABLE = """exp_avg scale_by_exp_avg_sq scale_by_adam update_by_adam scale_by_laprop update_by_laprop
    update_by_schedule_free update_by_adopt scale_by_adopt orthogonalize_update nesterov_momentum heavyball_momentum
    scale_by_soap scale_by_psgd scale_by_delayed_psgd update_by_psgd update_by_delayed_psgd palm_beta2 chain ChainOpt
    BaseOpt ScheduleFree FunctionTransform zero_guard copy_guard general_guard no_state no_state_no_foreach use_default
    str_or_fn SkipUpdate as_transform"""
UTILS = """compile_mode dynamic zeroth_power_mode l2_clip_ rmsnorm_clip_ trust_region_clip_ mu_law_compress
    a_law_compress identity set_torch clean hook_optimizer_into_model fused_hook disable_caution_scaling
    StatefulOptimizer update_param_"""
TRANSFORMS = """exp_avg scale_by_exp_avg_sq scale_by_adam scale_by_laprop scale_by_adopt schedule_free
    heavyball_momentum nesterov_momentum orthogonalize scale_by_soap scale_by_psgd scale_by_learning_rate
    add_decayed_weights chain apply_updates masked partition cautious mars apply_if_finite accumulate with_ema
    with_hyperparameters"""


def documented(signature: str) -> list[tuple[str, object]]:
    """Names and defaults, in order, of a signature as the documentation writes it."""
    scope = {"C": C}
    exec(f"def f({signature}): pass", scope)
    return [(p.name, p.default) for p in inspect.signature(scope["f"]).parameters.values()]


def positional(signature: inspect.Signature) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", CLASSES)
def test_class_signatures(name):
    signature = inspect.signature(getattr(hbfunc, name))
    assert positional(signature) == documented(CLASSES[name])
    rest = [p for p in signature.parameters.values() if p.kind is not p.POSITIONAL_OR_KEYWORD]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_arguments_of_their_class(name):
    cls = getattr(hbfunc, RECIPES[name])
    ours = dict(positional(inspect.signature(getattr(hbfunc, name))))
    expected = dict(documented(CLASSES[RECIPES[name]]))
    del expected["params"], expected["foreach"]
    assert list(ours) == list(expected)
    assert ours == {k: getattr(cls, k) if v is C.use_default else v for k, v in expected.items()}


@pytest.mark.parametrize("short", SHORT)
def test_short_names(short):
    assert getattr(heavyball, short) is getattr(heavyball, SHORT[short])


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_class_attributes_are_the_defaults(name):
    cls = getattr(hbfunc, name)
    assert {k: getattr(cls, k) for k in ATTRIBUTES[name]} == ATTRIBUTES[name]


def test_the_default_clipping_of_psgd():
    assert hbfunc.PSGDKron.update_clipping == "trust_region_clip_"
    assert hbfunc.PSGDKron.gradient_clipping is None


def test_specialised_classes_subclass_what_they_specialise():
    for name in CLASSES:
        for part, base in (("SOAP", "ForeachSOAP"), ("PSGD", "ForeachPSGDKron"), ("SFAdamW", "ForeachSFAdamW")):
            if part in name:
                assert issubclass(getattr(hbfunc, name), getattr(hbfunc, base))


@pytest.mark.parametrize(("module", "names"), [("chainable", CHAINABLE), ("utils", UTILS)])
def test_documented_names_of_the_modules(module, names):
    assert [n for n in names.split() if not hasattr(getattr(heavyball, module), n)] == []


def test_public_transforms():
    assert [n for n in TRANSFORMS.split() if not hasattr(hbfunc, n)] == []


def test_settings_have_their_documented_defaults():
    import subprocess
    import sys

    shown = "import hbfunc.utils as u; print(u.compile_mode, u.dynamic, u.zeroth_power_mode)"
    out = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["max-autotune-no-cudagraphs", "False", "qr"]


def test_signatures_of_the_composition_api():
    expected = {
        "ChainOpt": ["params", "defaults", "foreach", "fns"],
        "BaseOpt": [
            "params",
            "defaults",
            "foreach",
            "gradient_clipping",
            "update_clipping",
            "palm",
            "fns",
            "compile_step",
            "promote",
        ],
        "chain": ["state", "group", "grad", "param", "fns"],
        "zero_guard": ["names"],
        "copy_guard": ["index", "names"],
        "general_guard": ["names", "init_fn", "skip_first"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(C, name)).parameters)[: len(parameters)] == parameters, name
    assert C.BaseOpt.__init__.__kwdefaults__["compile_step"] is C.use_default


def test_what_editors_know_is_what_there_is():
    assert stubs.PATH.read_text() == stubs.stub(), "run: python tests/stubs.py"


def test_a_module_is_called_what_it_is():
    """No function of a package has the name of one of its modules, which would hide it from `import a.b as b`."""
    import importlib
    import pkgutil
    import types

    for found in pkgutil.walk_packages(hbfunc.__path__, "hbfunc."):
        if not found.name.endswith(("__main__", "lightning")):
            module = importlib.import_module(found.name)
            package, _, name = found.name.rpartition(".")
            assert isinstance(getattr(importlib.import_module(package), name), types.ModuleType), found.name
            assert getattr(importlib.import_module(package), name) is module
