"""What every Transform promises, as properties that can be checked: for hbfunc's own rules and for yours.

    import hbfunc.testing

    hbfunc.testing.check(my_transform())                              # every property, on a few small parameters
    hbfunc.testing.check(my_transform(), {"w": torch.zeros(3, 5)})    # on these
    hbfunc.testing.check(my_transform(), oracle=plain_loops)          # and its numbers, at 1e-12

`check` raises one AssertionError that lists every property that fails, with the leaf or the state entry that shows it.
A property is a function of a `Case`; all of them are in `PROPERTIES`, by name:

    @pytest.mark.parametrize("name", hbfunc.testing.PROPERTIES)
    def test_mine(name):
        hbfunc.testing.PROPERTIES[name](hbfunc.testing.case(my_transform()))

    hbfunc.testing.check_class(MyClass)                               # the promises of classes over a recipe

Everything is computed in float64, on parameters in a flat dict keyed by path. Float hyperparameters in the state (under
"hyper", at any depth: see `with_hyperparameters`) are changed, mapped over and differentiated one by one; a transform
without any is checked for the rest. Gradients are drawn from fixed seeds, and the global generator is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable

from hbfunc.contract import Transform
from hbfunc.leaves import Tree
from hbfunc.testing.cases import Arrays, Case, Extras, Grads, Oracle, Params, case, example
from hbfunc.testing.classes import CLASS_PROPERTIES, check_class
from hbfunc.testing.properties import PROPERTIES
from hbfunc.testing.trees import STEPS, TOLERANCE

__all__ = [
    "CLASS_PROPERTIES",
    "PROPERTIES",
    "STEPS",
    "TOLERANCE",
    "Arrays",
    "Case",
    "Extras",
    "Grads",
    "Oracle",
    "Params",
    "case",
    "check",
    "check_class",
    "example",
]


def check(
    transform: Transform,
    params: Tree | None = None,
    *,
    properties: Iterable[str] | None = None,
    oracle: Oracle | None = None,
    extras: Extras | None = None,
    host_extras: Extras | None = None,
) -> None:
    """Raise AssertionError, naming property and leaf, unless `transform` keeps every promise of the contract.

    params: any tree of floating point tensors, small ones; by default those of `example`.
    properties: names out of `PROPERTIES`; by default all.
    oracle: the same algorithm written independently. It is called with NumPy float64 arrays by path and a list of
        gradients, one dict per step with None for no gradient, and returns the parameters after each step.
    extras: from the step t = 1, 2, ... to keyword arguments of `update`, for a transform that needs some. host_extras:
        the same for the property that differentiates, where a decision in the graph (torch.cond) has no derivative.
    Raises TypeError if `transform` is not a Transform and KeyError for an unknown property.
    """
    this = case(transform, params, oracle=oracle, extras=extras, host_extras=host_extras)
    names = list(PROPERTIES if properties is None else properties)
    failures = []
    for name in names:
        try:
            PROPERTIES[name](this)
        except AssertionError as error:
            failures.append(error)
    if failures:
        lines = "\n".join(f"  {error}" for error in failures)
        raise AssertionError(
            f"{transform.name}: {len(failures)} of {len(names)} properties fail:\n{lines}"
        ) from failures[0]
