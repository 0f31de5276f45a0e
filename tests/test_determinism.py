"""What hbfunc/docs/determinism.md says and no other test shows; and that the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import ELEMENTWISE
from torch import Tensor

import hbfunc
from hbfunc import utils

PAGE = Path(__file__).parents[1] / "hbfunc/docs/determinism.md"
VECTORS = [(200, 300), (70_000,)]  # long enough to be shared by two threads
MATRICES = [(64, 96), (64, 96), (50,)]


def train(
    name: str, shapes: Any, *, threads: int = 1, mode: str | None = None, steps: int = 3, **options: Any
) -> list[Tensor]:
    """The parameters after some steps."""
    before = torch.get_num_threads(), utils.compile_mode
    torch.set_num_threads(threads)
    utils.compile_mode = mode
    try:
        draw = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
        optimizer = getattr(hbfunc, name)(params, lr=0.01, seed=0, **options)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()
        return [p.detach() for p in params]
    finally:
        torch.set_num_threads(before[0])
        utils.compile_mode = before[1]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "options"), [("AdamW", {"mars": True, "caution": True}), *((name, {}) for name in ELEMENTWISE)]
)
def test_elementwise_rules_do_not_depend_on_the_number_of_threads(name: str, options: dict[str, Any]) -> None:
    assert all(map(torch.equal, train(name, VECTORS, **options), train(name, VECTORS, threads=2, **options)))


@pytest.mark.parametrize(
    ("name", "shapes", "options"),
    [
        ("SOAP", MATRICES, {}),
        ("PSGDKron", MATRICES, {}),
        ("Muon", MATRICES, {}),
        ("AdamW", VECTORS, {"gradient_clipping": "l2_clip_"}),
    ],
)
def test_sums_depend_on_the_number_of_threads_by_rounding(name: str, shapes: Any, options: dict[str, Any]) -> None:
    assert difference(train(name, shapes, threads=2, **options), train(name, shapes, **options)) < 1e-6


@pytest.mark.parametrize("name", ["SOAP", "PSGDKron", "Muon"])
def test_batches_of_another_size_differ_by_rounding(name: str) -> None:
    assert difference(train(name, MATRICES, foreach=False), train(name, MATRICES)) < 1e-6


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_traced_without_a_code_generator_it_is_the_eager_step(name: str) -> None:
    """aot_eager: what differs under inductor is its kernels' arithmetic."""
    shapes = [(6, 4), (5,)]
    assert all(map(torch.equal, train(name, shapes, mode="aot_eager"), train(name, shapes)))


@pytest.mark.parametrize(
    "clip", ["l2_clip_", "rmsnorm_clip_", "mu_law_compress", "a_law_compress", "trust_region_clip_"]
)
def test_clipping_depends_on_strides_by_rounding(clip: str) -> None:
    x = torch.randn(7, 9, 4, 5, generator=torch.Generator().manual_seed(0))
    wide = x.new_zeros(7, 9, 4, 10)
    wide[..., ::2] = x
    expected = getattr(utils, clip)(x)
    for strided in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        torch.testing.assert_close(getattr(utils, clip)(strided), expected, rtol=1e-6, atol=0)


def test_the_tests_that_the_page_names_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)(?:\[(\w+)\])?`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, name, case in named:
        source = (PAGE.parents[2] / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source, (file, name)
        library = (PAGE.parents[2] / "hbfunc/testing/properties.py").read_text(encoding="utf-8")
        assert not case or f"def {case}(" in library, case
