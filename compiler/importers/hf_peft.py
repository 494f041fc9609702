"""The methods of Hugging Face PEFT that are imported, by its own names of them."""

from __future__ import annotations

from peltc.compiler.importers.hf_adalora import ADALORA
from peltc.compiler.importers.hf_beft import BEFT
from peltc.compiler.importers.hf_boft import BOFT
from peltc.compiler.importers.hf_hira import HIRA
from peltc.compiler.importers.hf_hra import HRA
from peltc.compiler.importers.hf_ia3 import IA3
from peltc.compiler.importers.hf_ln_tuning import LN_TUNING
from peltc.compiler.importers.hf_loha import LOHA
from peltc.compiler.importers.hf_lokr import LOKR
from peltc.compiler.importers.hf_lora import LORA
from peltc.compiler.importers.hf_miss import MISS
from peltc.compiler.importers.hf_oft import OFT
from peltc.compiler.importers.hf_tokens import TRAINABLE_TOKENS
from peltc.compiler.importers.hf_vera import VERA

FORMATS = {
    found.kind: found
    for found in (
        LORA,
        IA3,
        LOHA,
        OFT,
        ADALORA,
        LOKR,
        VERA,
        LN_TUNING,
        TRAINABLE_TOKENS,
        BOFT,
        HRA,
        MISS,
        HIRA,
        BEFT,
    )
}
