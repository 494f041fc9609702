"""The methods of Hugging Face PEFT that are imported, by its own names of them."""

from __future__ import annotations

from peltc.compiler.importers.peft.methods.adalora import ADALORA
from peltc.compiler.importers.peft.methods.beft import BEFT
from peltc.compiler.importers.peft.methods.boft import BOFT
from peltc.compiler.importers.peft.methods.c3a import C3A
from peltc.compiler.importers.peft.methods.delora import DELORA
from peltc.compiler.importers.peft.methods.fourierft import FOURIERFT
from peltc.compiler.importers.peft.methods.glora import GLORA
from peltc.compiler.importers.peft.methods.gralora import GRALORA
from peltc.compiler.importers.peft.methods.hira import HIRA
from peltc.compiler.importers.peft.methods.hra import HRA
from peltc.compiler.importers.peft.methods.ia3 import IA3
from peltc.compiler.importers.peft.methods.ln_tuning import LN_TUNING
from peltc.compiler.importers.peft.methods.loha import LOHA
from peltc.compiler.importers.peft.methods.lokr import LOKR
from peltc.compiler.importers.peft.methods.lora import LORA
from peltc.compiler.importers.peft.methods.miss import MISS
from peltc.compiler.importers.peft.methods.oft import OFT
from peltc.compiler.importers.peft.methods.prefix import PREFIX
from peltc.compiler.importers.peft.methods.prompt import CPT, MULTITASK, P_TUNING, PROMPT
from peltc.compiler.importers.peft.methods.pvera import PVERA
from peltc.compiler.importers.peft.methods.randlora import RANDLORA
from peltc.compiler.importers.peft.methods.road import ROAD
from peltc.compiler.importers.peft.methods.shira import SHIRA
from peltc.compiler.importers.peft.methods.tokens import TRAINABLE_TOKENS
from peltc.compiler.importers.peft.methods.vblora import VBLORA
from peltc.compiler.importers.peft.methods.vera import VERA
from peltc.compiler.importers.peft.methods.waveft import WAVEFT

_ALL = (
    LORA, IA3, LOHA, OFT, FOURIERFT, SHIRA, ROAD, C3A, DELORA, GRALORA, VBLORA, RANDLORA, PVERA, GLORA, WAVEFT,
    ADALORA, LOKR, VERA, BOFT, HRA, MISS, HIRA, BEFT, LN_TUNING, TRAINABLE_TOKENS,
    PREFIX, PROMPT, P_TUNING, CPT, MULTITASK,
)  # fmt: skip
FORMATS = {found.kind: found for found in _ALL}
