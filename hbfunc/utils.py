"""The documented settings and helpers. Settings are read at step time, so assigning to this module works:

hbfunc.utils.compile_mode = None         # no compilation
"""

from __future__ import annotations

compile_mode: str | None = "max-autotune-no-cudagraphs"
dynamic: bool | None = False
zeroth_power_mode: str = "qr"
caution_scaling: bool = True
