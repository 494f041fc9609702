"""Models that cannot be compiled, through the real command line: each is told for what it is, in one finding, before
anything is exported, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beyond import save, tiny
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.export import refusals
from peltc.spec.diagnostics import PeltError

LORA = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}


def refused(desk: Any, code: str, *words: str, options: tuple[str, ...] = (), model: str = "model") -> str:
    """The one finding, whose text holds these words and no name of an error of Python's."""
    err: str = desk.refuse(*options, model=model).err
    assert err.endswith("1 error\n") and f"  {code} " in err, err
    assert [word for word in words if word not in err] == [], err
    assert "exporting" not in err and "Traceback" not in err and "Error:" not in err, err
    return err


# quantised

METHODS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 3}, "quantised (gptq, 3 bits)", "that it was quantised from"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "(awq, 4 bits): the layout 'gemv' is not read",
        "that it was quantised from",
    ),
    "marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "the layout 'marlin' is not read",
        "that it was quantised from",
    ),
    "groups": (
        {"quant_method": "gptq", "bits": 4, "group_size": 24},
        "groups of 24 inputs are not read",
        "that it was quantised from",
    ),
    "words": (
        {"quant_method": "gptq", "bits": "4", "group_size": 32},
        "numbers of 4 bits are not read",
        "that it was quantised from",
    ),
    "fp8": ({"quant_method": "fp8"}, "quantised (fp8)", "FineGrainedFP8Config(dequantize=True)"),
    "bnb": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "quantised (bitsandbytes, 4 bits)",
        "`model.dequantize()`",
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "(bitsandbytes, 4 bits) by its config, and no tensor of it is in NF4",
        "`model.dequantize()`",
    ),
    "new": ({"quant_method": "brandnew"}, "quantised (brandnew)", "that it was quantised from"),
    "nameless": ({"some": "thing"}, "quantised (an unnamed method)", "that it was quantised from"),
}


@pytest.mark.parametrize("name", METHODS)
def test_quantised_checkpoints(desk: Any, name: str) -> None:
    settings, message, hint = METHODS[name]
    desk.copy_model(quantization_config=settings)
    refused(desk, "E508", "config.json  quantization_config\n", message, hint)


def test_a_config_of_quantised_weights_and_none(desk: Any) -> None:
    desk.copy_model(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    refused(desk, "E508", "(gptq, 4 bits) by its config, and no tensor of it is", "remove 'quantization_config'")


def test_every_quantisation_that_transformers_knows(tmp_path: Path) -> None:
    """Of each the method is named, and what to do."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert {"awq", "gptq", "fp8", "bitsandbytes_4bit"} <= set(AUTO_QUANTIZER_MAPPING)
    for name in AUTO_QUANTIZER_MAPPING:
        method, _, bits = name.partition("_") if name.startswith("bitsandbytes") else (name, "", "")
        settings = {"quant_method": method, f"load_in_{bits}": True} if bits else {"quant_method": method}
        with pytest.raises(PeltError) as caught:
            refusals.check_stored({"quantization_config": settings}, tmp_path)
        found = caught.value.diagnostics[0]
        assert found.code == "E508" and f"quantised ({method}" in found.message and found.hint, name


def test_packed_weights_whose_config_says_nothing(desk: Any) -> None:
    """GPTQ's and AWQ's own tools kept their settings in a file beside the config."""
    folder = desk.copy_model()
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("query.weight"))
    stem, shape = name.removesuffix(".weight"), tensors.pop(name).shape
    tensors |= {f"{stem}.qweight": np.zeros((shape[1] // 8, shape[0]), np.int32),
                f"{stem}.qzeros": np.zeros((1, shape[0] // 8), np.int32),
                f"{stem}.scales": np.ones((1, shape[0]), np.float16)}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(desk, "E508", f"'{stem}.qweight' holds packed whole numbers", "that it was quantised from")


def test_a_part_that_is_quantised(desk: Any) -> None:
    desk.copy_model(text_config={"quantization_config": {"quant_method": "gptq"}})
    refused(desk, "E508", "config.json  text_config.quantization_config\n")


def test_types_that_only_quantised_files_have(desk: Any) -> None:
    """The method is named, and not the type that such a file holds."""
    folder = desk.copy_model(quantization_config={"quant_method": "fp8"})
    text = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(text.replace(b'"F32"', b'"F8_"'))
    refused(desk, "E508", "quantised (fp8)")


@pytest.mark.parametrize("how", ["config", "integers", "eight_bits"])
def test_quantised_torch_models(desk: Any, how: str) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(desk.model)
    words = "'bert.pooler.dense.weight' is stored as"
    if how == "config":
        model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        words = "is quantised (bitsandbytes, 8 bits)"
    else:
        kind = torch.uint8 if how == "integers" else torch.float8_e4m3fn
        model.bert.pooler.dense.weight = torch.nn.Parameter(torch.zeros(32, 32).to(kind), requires_grad=False)
    before = desk.contents()
    with pytest.raises(PeltError, match="E508 the torch model BertForSequenceClassification is") as caught:
        peltc.compile(LORA, model, desk.folder / "out")
    assert words in str(caught.value)
    desk.check_same(before)


# pixels, sound, several at once


@pytest.fixture(scope="session")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models that read more than text."""
    home = tmp_path_factory.mktemp("beyond")

    def folder(name: str) -> Path:
        if not (home / name).is_dir():
            save(name, home / name)
        return home / name

    return folder


SENSES = {
    "vit": "ViTForImageClassification reads 'pixel_values' (images), and no token ids",
    "dinov2": "Dinov2Model reads 'pixel_values' (images), and no token ids",
    "wav2vec2": "Wav2Vec2ForCTC reads 'input_values' (sound), and no token ids",
    "whisper": "WhisperForConditionalGeneration reads 'input_features' (sound), and no token ids",
}


@pytest.mark.parametrize("name", SENSES)
def test_models_that_read_no_text(desk: Any, beyond: Callable[[str], Path], name: str) -> None:
    """Their text alone is asked for."""
    refused(desk, "E509", SENSES[name], model=str(beyond(name)), options=("--text-only",))


def test_torch_models_that_read_no_text(desk: Any) -> None:
    """A class of one's own too."""
    import transformers

    class Own(transformers.ViTForImageClassification):
        pass

    for model in (tiny("vit"), Own(tiny("vit").config)):
        with pytest.raises(PeltError, match=r"E509 .*reads 'pixel_values'"):
            peltc.compile(LORA, model, desk.folder / "out", text_only=True)


def test_generation_with_more_than_text(desk: Any, beyond: Callable[[str], Path]) -> None:
    for name, code, word in (("llava", "E510", "'pixel_values' beside token ids"), ("whisper", "E509", "(sound)")):
        outcome = desk.pelt("compile", "spec.yaml", str(beyond(name)), "-o", "out", "--generation")
        assert outcome.code == 1 and code in outcome.err and word in outcome.err
        assert not (desk.folder / "out").exists()


def test_inputs_that_cannot_be_made(desk: Any) -> None:
    """A class whose forward asks for what nobody knows is refused with what it said to each attempt."""
    import transformers

    class Own(transformers.ViTForImageClassification):
        def forward(self, pixel_values: Any, secret: Any) -> Any:
            return super().forward(pixel_values)

    with pytest.raises(PeltError, match=r"E514 how Own is given its inputs") as caught:
        peltc.survey(Own(tiny("vit").config))
    assert "secret" in str(caught.value) and "example_inputs" in str(caught.value)


def test_a_model_that_does_not_run_on_its_text(desk: Any, beyond: Callable[[str], Path]) -> None:
    err = desk.refuse("--text-only", model=str(beyond("clip"))).err
    assert "E510 CLIPModel cannot be exported through its text alone, without 'pixel_values'" in err
    assert "newer transformers" not in err


def test_a_model_through_its_text(desk: Any, beyond: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is compiled and verified, and the manifest says so; asked for once is not for ever."""
    monkeypatch.setenv("PELTC_CACHE", str(desk.folder / "cache"))
    model = str(beyond("llava"))
    outcome = desk.pelt("compile", "spec.yaml", model, "-o", "out", "--text-only")
    assert outcome.code == 0, outcome.err
    manifest = json.loads((desk.folder / "out" / "pelt.json").read_text())
    assert manifest["base"]["text_only"] is True
    assert desk.pelt("verify", "out").code == 0
    for command in (["sites"], ["plan", "spec.yaml"], ["describe", "spec.yaml"]):
        assert "vision" in desk.pelt(*command, model).out
        outcome = desk.pelt(*command, model, "--text-only")
        assert outcome.code == 0 and "vision" not in outcome.out
    assert not any(site.stack == "vision" for site in peltc.survey(model, text_only=True))
    assert len(peltc.plan("spec.yaml", model, text_only=True).claims) < len(peltc.plan("spec.yaml", model).claims)


def test_models_of_text_alone_say_so(desk: Any) -> None:
    assert desk.compile("--text-only").code == 0
    assert json.loads((desk.folder / "out" / "pelt.json").read_text())["base"]["text_only"] is False


def test_every_class_of_transformers_is_decided() -> None:
    """By the signatures and what classes declare: what takes token ids and no other main input is text's."""
    import transformers

    text = ("BertForMaskedLM", "T5ForConditionalGeneration", "GPT2LMHeadModel", "Gemma3ForCausalLM", "CLIPTextModel",
            "BltForCausalLM", "MoshiForCausalLM", "LayoutLMForTokenClassification")  # fmt: skip
    more = {"Qwen2VLForConditionalGeneration": "pixel_values", "Qwen2AudioForConditionalGeneration": "input_features",
            "Phi4MultimodalForCausalLM": "image_pixel_values", "LxmertModel": "visual_feats",
            "Gemma3ForConditionalGeneration": "pixel_values", "ClapModel": "input_features"}  # fmt: skip
    for name in text:
        assert refusals.beyond_text(getattr(transformers, name)) == [], name
        refusals.check_reads(getattr(transformers, name))
    for name, first in more.items():
        assert refusals.beyond_text(getattr(transformers, name))[0] == first, name


# classes


def test_a_class_of_another_type(desk: Any) -> None:
    desk.copy_model()
    words = ("T5ForConditionalGeneration is no class for the model type 'bert'", "BertForMaskedLM, ", "--architecture")
    err = refused(desk, "E512", *words, options=("--architecture", "T5ForConditionalGeneration"))
    assert "num_layers" not in err


def test_a_config_with_a_class_of_another_type(desk: Any) -> None:
    """The config's own word, found wrong when the model is built."""
    desk.copy_model(architectures=["T5ForConditionalGeneration"])
    err = desk.refuse(model="model").err
    assert "E512 T5ForConditionalGeneration is no class for the model type 'bert'" in err
    assert "one of: BertForMaskedLM" in err and "Error:" not in err


@pytest.mark.parametrize(
    "name", ["BertTokenizer", "AutoModel", "AutoModelForSequenceClassification", "BertConfig", "BertPreTrainedModel",
             "PreTrainedModel", "Trainer"],
)  # fmt: skip
def test_a_class_that_is_no_model(desk: Any, name: str) -> None:
    desk.copy_model()
    options = ("--architecture", name)
    refused(desk, "E512", f"{name} is no model class", "one of: BertForMaskedLM", options=options)


@pytest.mark.parametrize("name", ["pipeline", "models", "__doc__", "BertModle"])
def test_a_class_that_is_none(desk: Any, name: str) -> None:
    desk.copy_model()
    err = refused(desk, "E502", f"no architecture '{name}'", options=("--architecture", name))
    assert len(err) < 600


def test_a_class_for_the_same_type(desk: Any) -> None:
    assert desk.pelt("sites", str(desk.model), "--architecture", "BertModel").code == 0


OWN: dict[str, dict[str, Any]] = {
    "type": {"model_type": "brett", "auto_map": {"AutoModel": "modeling_brett.BrettModel"}},
    "class": {"architectures": ["BrettModel"], "auto_map": {"AutoModel": "modeling_brett.BrettModel"}},
    "file": {"model_type": "brett", "architectures": ["BrettModel"]},
}


@pytest.mark.parametrize("name", OWN)
def test_code_of_the_models_own(desk: Any, name: str) -> None:
    """Never run; and no list of what there is instead."""
    folder = desk.copy_model(**OWN[name])
    (folder / "modeling_brett.py").write_text(f"open({str(desk.folder / 'ran')!r}, 'w')")
    err = refused(desk, "E511", "own code (", "is not run", "peltc.compile(spec, module, out, example_inputs=")
    assert len(err) < 700
    assert not (desk.folder / "ran").exists()


def test_code_that_transformers_has_by_now(desk: Any) -> None:
    """A model whose code came into `transformers` keeps its own beside it."""
    desk.copy_model(auto_map={"AutoModel": "modeling_bert.BertModel"})
    assert desk.compile(model="model").code == 0


# numbers


BROKEN = "bert.encoder.layer.1.attention.output.dense.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(desk: Any, value: float) -> None:
    folder = desk.copy_model()
    tensors = load_file(folder / "model.safetensors")
    tensors[BROKEN][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = desk.pelt("compile", "spec.yaml", "model", "-o", "out")
    assert outcome.code == 1
    assert "model/model.safetensors\n  E513 the model itself, with no module attached, answers NaN" in outcome.err
    assert f"since the weight '{BROKEN}' is not finite" in outcome.err
    assert "report" not in outcome.err and "by nan" not in outcome.err
    assert not (desk.folder / "out").exists()


def test_numbers_that_are_too_large_for_the_type(desk: Any) -> None:
    """In float16 the logits overflow, and no weight does."""
    folder = desk.copy_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][:] = 60000
    tensors["bert.pooler.dense.bias"][:] = 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    desk.write("pelt: 1\nattach: [{method: lora, at: attention.query}]\ndeploy: {precision: float16}\n")
    outcome = desk.pelt("compile", "spec.yaml", "model", "-o", "out")
    assert outcome.code == 1
    assert "E704" in outcome.err and "float16: 'logits' has values that are not finite" in outcome.err
    assert "precision: float32" in outcome.err
    desk.write("pelt: 1\nattach: [{method: lora, at: attention.query}]\ndeploy: {precision: float32}\n")
    assert desk.pelt("compile", "spec.yaml", "model", "-o", "out").code == 0


def test_soundness_by_itself(desk: Any) -> None:
    from peltc.compiler.base.opening import open_base
    from peltc.runtime.verification.sound import check_sound

    base = open_base(desk.model)
    check_sound({"a": np.ones(2)}, base)
    with pytest.raises(PeltError, match=r"E513 .* in 'b', computed in float32; its weights are finite"):
        check_sound({"a": np.ones(2), "b": np.array([1, -np.inf], np.float16)}, base)
