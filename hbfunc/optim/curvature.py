"""Hessian-vector products of the closure's loss, for transforms that fit their preconditioner on curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbfunc.forms import short
from hbfunc.optim.shim import StatefulOptimizer
from hbfunc.optim.unit import Unit


class WithCurvature(StatefulOptimizer):
    """Adds `curvature=True`: groups with it need a closure that returns the loss and does *not* call backward():

        optimizer.step(lambda: loss_fn(model(x), y))

    `step` takes the gradients itself, with a graph; and on steps that refresh the preconditioner, Hessian-vector
    products with the transform's random probes, for all groups at once. Gradients of earlier backward() calls are not
    used.
    """

    _gradients: dict[Tensor, Tensor] = {}  # noqa: RUF012  # with their graph, within a step; replaced, never changed

    def finish(self) -> None:
        self._gradients = {}

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure, and with `curvature=True` take the gradients of the loss that it returns.

        Raises ValueError if there is no closure, and RuntimeError if it returns no loss with a graph.
        """
        groups = self.param_groups
        if not any(group["curvature"] for group in groups):
            return super().evaluate(closure)
        if closure is None:
            # torch.distributed.checkpoint makes a state by a step without closure, with gradients and rates of zero.
            if all(group["lr"] == 0 for group in groups):
                return None
            raise ValueError(
                "curvature=True: expected step(closure), a closure that returns the loss and does not call backward()"
            )
        loss = super().evaluate(closure)
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        try:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise RuntimeError(
                f"curvature=True: the closure returned {short(loss)}, expected a loss with its graph, no backward()"
            ) from error
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.detach()
        self._gradients = {p: g for p, g in zip(params, grads, strict=True) if g is not None}
        return loss

    def products(self, work: list[tuple[dict[str, Any], Unit]], decisions: list[Any]) -> list[list[Tensor] | None]:
        newton = [group["curvature"] for group, _ in work]
        due = [wanted and decision is not False for wanted, decision in zip(newton, decisions, strict=True)]
        v: dict[Tensor, Tensor] = {}
        if any(due):
            for (_, unit), wanted, decision in zip(work, newton, decisions, strict=True):
                v |= unit.probes(decision) if wanted else {}
        product_of = self._times_hessian(v)
        products: list[list[Tensor] | None] = []
        for (_, unit), wanted, now in zip(work, newton, due, strict=True):
            params = unit.moving() if now else []
            of_unit = [product_of[p] if p in product_of else torch.zeros_like(p) for p in params]
            products.append(of_unit if wanted else None)
        return products

    def _times_hessian(self, v: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """H v for the parameters in v; those that the product does not depend on are left out."""
        bent = [p for p in v if p in self._gradients and self._gradients[p].requires_grad]
        if not bent:
            return {}
        grads = [self._gradients[p] for p in bent]
        products = torch.autograd.grad(grads, list(v), [v[p] for p in bent], allow_unused=True)
        return {p: h for p, h in zip(v, products, strict=True) if h is not None}
