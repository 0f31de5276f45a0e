"""Partitions of a model: one optimizer for the hidden matrices, another for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch, translate
from typing import Any

from torch import Tensor, nn

from hbfunc.contract import Transform, remembered
from hbfunc.optim.wrapped import FromTransform
from hbfunc.optimizers.adam import adamw
from hbfunc.partitions import partition
from hbfunc.ranges import truth

Exclude = str | Sequence[str] | Callable[[str, Tensor], bool]

# What the input and output layers of common models are called. Names that hidden layers have too count where they are
# those of a parameter's own module: "decoder.weight", but not "decoder.block.0.weight".
ENDS = (
    *("*embed*", "emb", "*_emb", "wte", "wpe", "relative_attention_bias"),
    *("cls_token", "dist_token", "mask_token", "reg_token", "register_tokens"),
    *("head", "heads", "*_head", "classifier", "logits"),
    *("output.weight", "fc.weight", "shared.weight", "decoder.weight"),
)
_HEADS = ("head", "*_head", "classifier", "logits")  # what a Linear that is one is called itself
_HIDDEN = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # parts of paths that wrappers of models add


@remembered
def matrices_to(
    matrices: Transform,
    rest: Transform | None = None,
    exclude: Exclude = ENDS,
) -> Transform:
    """Step parameters of two or more dims with `matrices`; vectors, scalars and excluded ones with `rest` (`adamw()`).

    exclude: which matrices to leave to `rest`: embeddings and heads, which an orthogonalized update does not suit.
        `embeddings_and_head(model)` finds them by the model's modules. Or give shell patterns for any one part of a
        path ("*embed*" for "model.embed_tokens.weight"), or with a dot for several parts at its end ("decoder.weight");
        or a function (path, parameter) -> bool. By default the usual names of input and output layers; `()` excludes
        nothing.

    Each half keeps its hyperparameters: state["matrices"]["hyper"] and state["rest"]["hyper"]. A sweep has columns for
    the rates of both, {"matrices.lr": [0.01, 0.02], "rest.lr": [1e-3, 3e-4]}. What a matrix is made of, such as the
    heads of attention or a stack of experts, its rule is told by `heads`, `split_sizes` and `batch_dims`, see `muon`.

        tx = matrices_to(muon(lr=0.02), rest=adamw(lr=3e-4))
        tx = matrices_to(normuon(heads=lambda path, p: 12 if path.endswith("query.weight") else None))
        tx = matrices_to(muon(lr=0.02), exclude=embeddings_and_head(model))
        tx = matrices_to(soap(), exclude=lambda path, p: max(p.shape) > 10_000)
    """

    chosen = chooses_matrices(exclude)
    return partition(
        {"matrices": matrices, "rest": adamw() if rest is None else rest},
        lambda path, p: "matrices" if chosen(path, p) else "rest",
    )


def chooses_matrices(exclude: Exclude) -> Callable[[str, Tensor], bool]:
    """Make the function (path, parameter) -> whether it is one of `matrices_to`'s matrices."""
    patterns = [exclude] if isinstance(exclude, str) else exclude
    # How many parts of a path, and what they match: compiled here, because torch.compile cannot follow fnmatch.
    known = [] if callable(patterns) else [(p.count(".") + 1, re.compile(translate(p))) for p in patterns]

    def chosen(path: str, p: Tensor) -> bool:
        if p.ndim < 2:
            return False
        if callable(patterns):
            return not truth(patterns(path, p), "exclude", path)
        parts = path.split(".")
        for several, pattern in known:
            for part in parts if several == 1 else [".".join(parts[-several:])]:
                if pattern.match(part):
                    return False
        return True

    return chosen


def embeddings_and_head(model: nn.Module) -> Callable[[str, Tensor], bool]:
    """Make a function for `exclude` of `matrices_to` and `MatricesTo` that finds embeddings and heads by the modules of
    `model`. It takes (path, parameter) with the names of `model.named_parameters()`.

    It excludes every Embedding, the last Linear in the order of the modules, Linears that are called a head, and
    parameters tied to one of them. Other parameters of Linear, convolutional, recurrent and attention modules are not
    excluded, whatever their names. For parameters outside of such modules (a class token, positions) the usual names
    decide.

        optimizer = MatricesTo(model.named_parameters(), muon(lr=0.02), exclude=embeddings_and_head(model))
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    heads = [m for name, m in linear if any(fnmatch(name.rpartition(".")[2], pattern) for pattern in _HEADS)]
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    ends = [*embeddings, *heads, *(m for _, m in linear[-1:])]
    outer = {id(p) for m in ends for p in m.parameters(recurse=False)}
    hidden = {id(p) for m in model.modules() if isinstance(m, _HIDDEN) for p in m.parameters(recurse=False)}
    named = model.named_parameters(remove_duplicate=False)
    return _Ends({_unwrapped(path): id(p) in outer for path, p in named if id(p) in outer | hidden})


class _Ends:
    """The function that `embeddings_and_head` returns: by module if it is known, else by name."""

    def __init__(self, known: dict[str, bool]) -> None:
        self.known = known

    def __call__(self, path: str, p: Tensor) -> bool:
        known = self.known.get(_unwrapped(path))
        return not chooses_matrices(ENDS)(path, p) if known is None else known


def _unwrapped(path: str) -> str:
    return ".".join([part for part in path.split(".") if part not in _WRAPPERS])


class MatricesTo(FromTransform):
    """`matrices_to` as a torch.optim class: parameters of two or more dims to `matrices`, the rest to `rest`.

        MatricesTo(model.named_parameters(), hbfunc.muon(lr=0.02), rest=hbfunc.adamw(lr=3e-4))

    param_groups[0] are the matrices and param_groups[1] the rest (AdamW, if not given), each with its hyperparameters.
    named_params: (name, parameter) pairs, because `exclude` is about names; see `hbfunc.matrices_to`.
    Raises TypeError for parameters without names.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        matrices: Transform,
        rest: Transform | None = None,
        exclude: Exclude = ENDS,
        *,
        foreach: bool = True,
        use_ema: bool | None = None,
        curvature: bool = False,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        pairs = list(named_params)
        if not all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in pairs):
            raise TypeError("named_params: expected (name, parameter) pairs, such as model.named_parameters()")
        chosen = chooses_matrices(exclude)
        groups: list[dict[str, Any]] = [
            {"params": [pair for pair in pairs if chosen(*pair)], "transform": matrices},
            {"params": [pair for pair in pairs if not chosen(*pair)], "transform": adamw() if rest is None else rest},
        ]
        for group in groups:
            if not group["params"]:
                group["param_names"] = []  # a group with no names otherwise, which torch refuses beside one with some
        super().__init__(
            groups,
            foreach=foreach,
            use_ema=use_ema,
            curvature=curvature,
            nonfinite=nonfinite,
            consume_grad=consume_grad,
        )

    def looks_at_whole(self, group: dict[str, Any]) -> bool:
        """True: the groups were chosen by shapes, and flat shards have none of two dims."""
        return True
