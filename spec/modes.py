"""The modes of deployment: where the tensors of an attachment are in the artifact."""

from __future__ import annotations

FOLD, STATIC, SWAPPABLE = "fold", "static", "swappable"
"""In the base's weights where that is exact; in the graph, as constants; in inputs, which profiles bring."""
MODES = (FOLD, STATIC, SWAPPABLE)
