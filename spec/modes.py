"""The modes of deployment: where the tensors of an attachment are in the artifact."""

from __future__ import annotations

FOLD, STATIC, SWAPPABLE, BANK = "fold", "static", "swappable", "bank"
"""In the base's weights where that is exact; in the graph, as constants; in inputs, one profile at a time; in inputs,
another profile for each row of a batch."""
MODES = (FOLD, STATIC, SWAPPABLE, BANK)
PACKED, MIXED = "packed", "mixed"
"""What a profile of a bank of modules is, in `mode: bank`: its masks, by which the graph mixes the bank on each run; or
the modules that they mix."""
EXCHANGED = (SWAPPABLE, BANK)
"""The modes in which modules are exchanged while an artifact runs."""
