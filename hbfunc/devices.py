"""What is done otherwise on another kind of device: the one table of such choices, each with its reason and source.

A rule that depends on where its tensors are asks `choose`. A measurement on a new device then changes this table, and
no code. "Other" is every device but the CPU, tensors without values (meta) among them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


class Choice(NamedTuple):
    """What is chosen on the CPU and on other devices, why, and where that is known from."""

    cpu: Any
    other: Any
    reason: str
    source: str


CHOICES: dict[str, Choice] = {
    "newton_schulz": Choice(
        torch.bfloat16 if _AMX else torch.float32,
        torch.bfloat16,
        "dtype in which Newton-Schulz iterations multiply, float64 aside: tensor cores and AMX multiply bfloat16 "
        "several times as fast; a CPU without computes in float32 and pays for the conversion",
        "Jordan et al. 2024 (Muon) for GPUs; benchmarks/results for CPUs",
    ),
    "soap_qr": Choice(
        "householder",
        "cholesky",
        "form of the QR factorization in SOAP's refreshes: Householder's reflections are one matrix-vector product "
        "after another, matrix by matrix, on GPUs; Cholesky-QR is products of whole stacks, and waits for nothing",
        "Fukaya et al. 2020, arXiv 1809.11085, section 5, for many-core machines; not measured here on a GPU",
    ),
    "triangular_block": Choice(
        192,
        384,
        "columns of a block in products with triangular factors: smaller ones save more multiplications, but are more "
        "kernels to launch and, where the graph does not call them, to compile",
        "benchmarks/results for CPUs; not measured on a GPU",
    ),
    "call_products": Choice(
        2**17,
        math.inf,
        "entries from which on a compiled step calls the chains of matrix products of Muon and PSGD as they are: on "
        "CPUs they are products and little else, and to compile around them is a minute or more of start-up; of small "
        "matrices the calls themselves would be the time; on GPUs compiling saves launches and passes over memory, and "
        "CUDA graphs are captured",
        "benchmarks/README.md, start-up, for CPUs; not measured on a GPU",
    ),
    "autotune": Choice(
        False,
        True,
        "whether compile_mode='max-autotune' means more than 'default': on CPUs there is nothing to tune",
        "torch.compile's documentation",
    ),
}

# A matrix with so many rows and columns has a stack of its own, on every device: stacks are entries of functional
# states, which are moved between devices as they are. From here on a matrix fills an H100 alone, as is published of
# Muon's and PSGD's implementations, and a stack only costs memory.
ALONE = 2048


def choose(name: str, device: torch.device) -> Any:
    """The choice of this name on this device."""
    choice = CHOICES[name]
    return choice.cpu if device.type == "cpu" else choice.other
