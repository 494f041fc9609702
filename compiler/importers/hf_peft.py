"""The methods of Hugging Face PEFT that are imported, by its own names of them."""

from __future__ import annotations

from peltc.compiler.importers.formats import Entry
from peltc.compiler.importers.hf_lora import LORA

FORMATS = {found.kind: found for found in (LORA,)}
WHOLE = Entry("replace")
"""What a module of `modules_to_save`, which is trained as a whole, becomes."""
