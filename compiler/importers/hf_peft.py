"""The methods of Hugging Face PEFT that are imported, by its own names of them."""

from __future__ import annotations

from peltc.compiler.importers.hf_adalora import ADALORA
from peltc.compiler.importers.hf_beft import BEFT
from peltc.compiler.importers.hf_boft import BOFT
from peltc.compiler.importers.hf_c3a import C3A
from peltc.compiler.importers.hf_delora import DELORA
from peltc.compiler.importers.hf_fourierft import FOURIERFT
from peltc.compiler.importers.hf_glora import GLORA
from peltc.compiler.importers.hf_gralora import GRALORA
from peltc.compiler.importers.hf_hira import HIRA
from peltc.compiler.importers.hf_hra import HRA
from peltc.compiler.importers.hf_ia3 import IA3
from peltc.compiler.importers.hf_ln_tuning import LN_TUNING
from peltc.compiler.importers.hf_loha import LOHA
from peltc.compiler.importers.hf_lokr import LOKR
from peltc.compiler.importers.hf_lora import LORA
from peltc.compiler.importers.hf_miss import MISS
from peltc.compiler.importers.hf_oft import OFT
from peltc.compiler.importers.hf_prefix import PREFIX
from peltc.compiler.importers.hf_prompt import CPT, MULTITASK, P_TUNING, PROMPT
from peltc.compiler.importers.hf_pvera import PVERA
from peltc.compiler.importers.hf_randlora import RANDLORA
from peltc.compiler.importers.hf_road import ROAD
from peltc.compiler.importers.hf_shira import SHIRA
from peltc.compiler.importers.hf_tokens import TRAINABLE_TOKENS
from peltc.compiler.importers.hf_vblora import VBLORA
from peltc.compiler.importers.hf_vera import VERA
from peltc.compiler.importers.hf_waveft import WAVEFT

_ALL = (
    LORA, IA3, LOHA, OFT, FOURIERFT, SHIRA, ROAD, C3A, DELORA, GRALORA, VBLORA, RANDLORA, PVERA, GLORA, WAVEFT,
    ADALORA, LOKR, VERA, BOFT, HRA, MISS, HIRA, BEFT, LN_TUNING, TRAINABLE_TOKENS,
    PREFIX, PROMPT, P_TUNING, CPT, MULTITASK,
)  # fmt: skip
FORMATS = {found.kind: found for found in _ALL}
