"""Other people's MAC counters (thop, ptflops) find a layer's rule by its exact class: tell them ours.

fvcore, torchinfo and torch's FlopCounterMode count operations or go by `isinstance` and need nothing.
"""

from __future__ import annotations

import sys

from torch import nn

# The modules of their rules, {class: rule}, under these names.
_TABLES = {"thop.profile": "register_hooks", "ptflops.pytorch_ops": "MODULES_MAPPING"}


def share_rules(cls: type[nn.Module], plain: type[nn.Module]) -> None:
    """Let every counter that is imported count `cls` as it counts `plain`."""
    for module, name in _TABLES.items():
        table = getattr(sys.modules.get(module), name, None)
        if isinstance(table, dict) and plain in table:
            table.setdefault(cls, table[plain])
