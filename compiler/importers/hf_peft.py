"""The methods of Hugging Face PEFT that are imported, by its own names of them."""

from __future__ import annotations

from peltc.compiler.importers.hf_ia3 import IA3
from peltc.compiler.importers.hf_loha import LOHA
from peltc.compiler.importers.hf_lora import LORA
from peltc.compiler.importers.hf_oft import OFT

FORMATS = {found.kind: found for found in (LORA, IA3, LOHA, OFT)}
