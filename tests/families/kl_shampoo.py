"""KL-Shampoo: the oracle, which is SOAP's with a power in the place of Adam, and its rows of the conformance table."""

from __future__ import annotations

import functools

import oracles
from families.shampoo import table

import hbfunc

oracle = functools.partial(oracles.soap, kl=True, power=0.5)
ROWS = table(hbfunc.kl_shampoo, oracle)
