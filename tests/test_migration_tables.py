"""Coming from TorchOpt and dion: what the page says to be here is here, and every public name has its row."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_optax_page import namespace, snippets

import hbfunc
from hbfunc import Transform, hypergrad

PAGE = (Path(hbfunc.__file__).parent / "docs/migration.md").read_text(encoding="utf-8")
# Of TorchOpt 0.7.3: what is called, without types; and the optimizers of dion 0.1.
TORCHOPT = """
    AdaDelta AdaGrad AdaMax Adadelta Adagrad Adam AdamW Adamax FuncOptimizer MetaAdaDelta MetaAdaGrad MetaAdaMax
    MetaAdadelta MetaAdagrad MetaAdam MetaAdamW MetaAdamax MetaOptimizer MetaRAdam MetaRMSProp MetaRMSprop MetaSGD
    Optimizer RAdam RMSProp RMSprop SGD accelerated_op_available adadelta adagrad adam adamax adamw apply_updates
    base.identity chain clip.clip_grad_norm combine.chain_flat diff.implicit.custom_root diff.zero_order.zero_order
    extract_state_dict hook.nan_to_num_hook hook.zero_nan_hook linalg.cg linalg.ns linalg.ns_inv linear_solve.solve_cg
    linear_solve.solve_inv linear_solve.solve_normal_cg module_clone module_detach_ nan_to_num
    nn.ImplicitMetaGradientModule nn.MetaGradientModule nn.ZeroOrderGradientModule nn.reparameterize nn.reparametrize
    nn.swap_state radam recover_state_dict register_hook rmsprop schedule.exponential_decay schedule.linear_schedule
    schedule.polynomial_schedule sgd stop_gradient transform.add_decayed_weights transform.masked transform.scale
    transform.scale_by_accelerated_adam transform.scale_by_adadelta transform.scale_by_adam transform.scale_by_adamax
    transform.scale_by_radam transform.scale_by_rms transform.scale_by_rss transform.scale_by_schedule
    transform.scale_by_stddev transform.trace visual.make_dot visual.resize_graph
"""
DION = ["Muon", "NorMuon", "Dion", "Dion2", "Dion3", "NorDion2"]


def rows(section: str) -> list[list[str]]:
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(f"| {section[5:]} |")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if not line.startswith("| in ")]


ROWS = {section: rows(section) for section in ("From TorchOpt", "From dion")}


def test_every_name_has_one_row() -> None:
    first = [name for row in ROWS["From TorchOpt"] for name in snippets(row[0])]
    assert sorted(first) == sorted(TORCHOPT.split())
    assert set(DION) <= {name for row in ROWS["From dion"] for name in snippets(row[0])}
    absent = [n.split(".")[-1] for row in ROWS["From TorchOpt"] if row[1] == "absent" for n in snippets(row[0])]
    assert [n for n in absent if hasattr(hbfunc, n)] == []


def test_the_names_are_those_of_torchopt() -> None:
    if importlib.util.find_spec("torchopt") is None:
        pytest.skip("needs TorchOpt")
    import torchopt

    for name in TORCHOPT.split():
        there = torchopt
        for part in name.split("."):
            there = getattr(there, part)
        assert callable(there)


@pytest.mark.parametrize("section", ROWS)
def test_what_the_page_says_to_be_here_is_here(section: str) -> None:
    """Expressions are evaluated, a transform makes a step, and `name=` is an option of muon or of every recipe."""
    model = torch.nn.Linear(3, 2)
    known = namespace() | {
        "hypergrad": hypergrad,
        "batches": [None] * 2,
        "loss_fn": lambda p, batch: p["w"].square().sum(),
        "named_parameters": [*model.named_parameters()],
    }
    params = known["params"]
    for row in ROWS[section]:
        here = snippets(row[1])
        assert here or row[1] in ("absent", "nothing"), row
        for expression in here:
            if "=" in expression and "(" not in expression.split("=")[0]:  # options, with values or without
                value = eval(f"dict({expression + ('None' if expression.endswith('=') else '')})", known)
                tx = hbfunc.muon(**value)
            else:
                value = tx = eval(expression, known | {"lr": 0.1})
            if isinstance(tx, Transform):
                updates, _ = tx.update(tx.init(params), known["grads"], params)
                assert all(u is None or u.isfinite().all() for u in updates.values()), expression
