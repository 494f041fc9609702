"""The keys of what the cache holds: whatever would make an entry another is part of its key."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from typing import Any

FORMAT = 16
"""Of what is cached; a change of code that changes an entry raises it."""
TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript")
"""The packages whose version decides what an export is."""
VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype", "use_cache")
"""What a config says that does not decide the graph."""


def key_of(*facts: Any) -> str:
    """A key [64 hexadecimal digits] from plain data, the format and the tools' versions."""
    versions = {tool: metadata.version(tool) for tool in TOOLS}
    return hashlib.sha256(json.dumps([FORMAT, *facts, versions], sort_keys=True).encode()).hexdigest()
