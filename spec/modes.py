"""How an artifact is deployed: where the tensors of an attachment are in it, and what it is to run on."""

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
ANY, CUDA, CPU = "any", "cuda", "cpu"
PROVIDERS = (ANY, CUDA, CPU)
"""What runs an artifact: whichever of ONNX Runtime's execution providers there is, a CUDA device, or the CPU."""
