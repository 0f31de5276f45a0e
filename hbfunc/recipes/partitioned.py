"""One optimizer for the hidden matrices, another for the rest of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch

from torch import Tensor

from hbfunc.combinators import partition
from hbfunc.recipes.first_order import adamw
from hbfunc.transform import Transform, remembered

Exclude = str | Sequence[str] | Callable[[str, Tensor], bool]

# What the input and output layers of common models are called.
ENDS = ("*embed*", "emb", "*_emb", "wte", "wpe", "head", "heads", "*_head", "classifier")


@remembered
def matrices_to(
    matrices: Transform,
    rest: Transform | None = None,
    exclude: Exclude = ENDS,
) -> Transform:
    """Leaves of two or more dims to `matrices`, vectors, scalars and what is excluded to `rest`, by default `adamw()`.

    exclude: embeddings and heads, which an orthogonalised update does not suit: shell patterns for any one part of a
        path ("*embed*" for "model.embed_tokens.weight"), or a function (path, parameter) -> bool. By default the
        usual names of input and output layers. `()` excludes nothing.

    Each half keeps its hyperparameters: state["matrices"]["hyper"] and state["rest"]["hyper"].

        tx = matrices_to(muon(lr=0.02), rest=adamw(lr=3e-4))
        tx = matrices_to(soap(), exclude=lambda path, p: max(p.shape) > 10_000)
    """

    chosen = chooses_matrices(exclude)
    return partition(
        {"matrices": matrices, "rest": adamw() if rest is None else rest},
        lambda path, p: "matrices" if chosen(path, p) else "rest",
    )


def chooses_matrices(exclude: Exclude) -> Callable[[str, Tensor], bool]:
    """(path, parameter) -> whether it is one of `matrices_to`'s matrices."""
    patterns = [exclude] if isinstance(exclude, str) else exclude

    def chosen(path: str, p: Tensor) -> bool:
        if p.ndim < 2:
            return False
        if callable(patterns):
            return not patterns(path, p)
        return not any(fnmatch(part, pattern) for part in path.split(".") for pattern in patterns)

    return chosen
