"""Choices that depend on the device, and Cholesky-QR in place of Householder's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc.devices import CHOICES, choose
from hbfunc.linalg import eigenbasis

ROOT = Path(hbfunc.__file__).parent


def test_the_table_is_the_only_place() -> None:
    """No rule looks at the kind of its device elsewhere, every choice is asked for, and has a reason and a source."""
    rules = [p for part in ("linalg", "transforms", "optimizers") for p in (ROOT / part).glob("*.py")]
    rules += [ROOT / name for name in ("buckets.py", "stacks.py", "branch.py", "combinators.py", "schedules.py")]
    code = {str(path.relative_to(ROOT)): path.read_text() for path in rules}
    looks = {name for name, text in code.items() if re.search(r"is_cuda|device\.type", text)}
    # Whether a number is known to the host, for a schedule of refreshes.
    assert looks == {"transforms/psgd.py", "transforms/soap.py"}
    asked = set(re.findall(r'(?:choose\(|choice=)"(\w+)"', "".join(p.read_text() for p in ROOT.rglob("*.py"))))
    assert asked == set(CHOICES)
    assert all(choice.reason and choice.source for choice in CHOICES.values())


def table_of_choices() -> str:
    """As on the page about GPUs."""
    lines = [f"| `{k}` | {_on_cpu(k)} | {_shown(x.other)} | {x.reason} | {x.source} |" for k, x in CHOICES.items()]
    return "\n".join(["| choice | CPU | other devices | why | source |", "|---|---|---|---|---|", *lines])


def _on_cpu(name: str) -> str:
    # which of both it is depends on the CPU that runs the tests
    return "float32, or bfloat16 with AMX" if name == "newton_schulz" else _shown(CHOICES[name].cpu)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).removeprefix("torch.")


def test_the_page_has_the_table() -> None:
    assert table_of_choices() in (ROOT / "docs/gpu.md").read_text(encoding="utf-8")


def test_choices() -> None:
    assert choose("soap_qr", torch.device("cpu")) == "householder"
    assert choose("soap_qr", torch.device("cuda", 1)) == "cholesky"
    x = torch.ones(8, 4, device="meta")
    assert hbfunc.linalg.polar.product_dtype(x) == torch.bfloat16
    assert hbfunc.linalg.polar.product_dtype(x.double()) == torch.float64


def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Bases and covariances of a training, as SOAP refreshes them."""
    seen = []
    real = eigenbasis.refresh

    def refresh(q: Tensor, gg: Tensor, qr: str = "auto") -> tuple[Tensor, Tensor]:
        seen.append((q.clone(), gg.clone()))
        return real(q, gg, qr)

    monkeypatch.setattr(eigenbasis, "refresh", refresh)
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = [torch.nn.Parameter(draw(m, n) / n**0.5) for m, n in ((96, 48), (48, 96), (10, 48))]
    x = draw(256, 6) @ draw(6, 48) + 0.1 * draw(256, 48)
    y = (x[:, :10] ** 2).argmax(1)
    optimizer = hbfunc.SOAP(weights, lr=3e-3)
    for _ in range(60):
        rows = torch.randint(256, (32,), generator=generator)
        hidden = torch.relu(x[rows] @ weights[0].T)  # with dead units
        torch.nn.functional.cross_entropy(torch.tanh(hidden @ weights[1].T) @ weights[2].T, y[rows]).backward()
        optimizer.step()
    monkeypatch.undo()
    return seen


def test_cholesky_is_householder_up_to_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the covariances of a training: to 1e-5 where Householder's own rounding errors are below a tenth of that, as
    they are but for the first steps, whose covariances lack full rank. And orthonormal everywhere."""
    seen = refreshes(monkeypatch)
    compared = 0
    for q, gg in seen:
        (q1, order1), (q2, order2) = (eigenbasis.refresh(q, gg, kind) for kind in ("householder", "cholesky"))
        assert torch.equal(order1, order2)
        eye = torch.eye(q.shape[-1])
        assert (q2.mT @ q2 - eye).abs().max() < 3e-6
        moved = gg @ q  # the rounded one, of which both are factors
        exact = torch.linalg.qr(moved.gather(-1, order1.unsqueeze(-2).expand_as(moved)).double()).Q
        errors = [(x * (x * exact).sum(-2, keepdim=True).sign() - exact).abs().amax((-2, -1)) for x in (q1, q2)]
        known = errors[0] < 1e-6
        compared += int(known.sum())
        assert (errors[1][known] < 1e-5).all()
    assert compared > 0.7 * sum(len(q) for q, _ in seen)


def test_columns_keep_their_direction() -> None:
    """Cholesky factors have a positive diagonal: no column turns around, as Householder's do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    gg = x @ x.mT
    q = eigenbasis.eigenbasis(gg)
    new, order = eigenbasis.refresh(q, gg, "cholesky")
    assert torch.allclose(new, q.gather(-1, order.unsqueeze(-2).expand_as(q)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_of_deficient_rank(dtype: torch.dtype) -> None:
    """Orthonormal bases that find what there is to find: of one direction, of a few, of none, of dead rows, and of
    what has no values the old one."""
    generator = torch.Generator().manual_seed(0)
    n = 32
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype)).Q
    for rank, scale in ((1, 1.0), (5, 1e-8), (5, 1e8), (0, 1.0), (n - 3, 1.0)):
        x = torch.randn(n, rank, generator=generator, dtype=dtype) * scale
        x[:4] = 0
        gg, new = x @ x.mT, q
        for _ in range(40):
            new, _ = eigenbasis.refresh(new, gg, "cholesky")
            assert (new.mT @ new - torch.eye(n)).abs().max() < 30 * torch.finfo(dtype).eps
        left = new[:, rank:].mT @ gg @ new[:, rank:]
        assert left.abs().max() <= 1e-4 * gg.abs().max()
    for bad in (float("inf"), float("nan")):
        new, order = eigenbasis.refresh(q, torch.full((n, n), bad, dtype=dtype), "cholesky")
        assert torch.equal(new, q[:, order])


def test_only_known_forms() -> None:
    with pytest.raises(ValueError, match="qr"):
        hbfunc.soap(qr="gram_schmidt")
