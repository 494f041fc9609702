"""The code in the documents runs: Python page by page in one namespace; commands have the options that they name."""

from __future__ import annotations

import json
import queue
import re
import shlex
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import foreign
import models
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.runtime.commands.cli import cli, run
from peltc.runtime.running.form import write_profile
from peltc.runtime.serving.server import serve

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
IDS = [[3, 4, 5], [6, 7, 8]]
ATTACHED = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """A page's blocks of code in some languages, each with its language."""
    found = FENCE.findall(PAGES[page].read_text(encoding="utf-8"))
    return [(language, textwrap.dedent(text)) for _, language, text in found if language in languages]


def with_tokenizer(folder: Path) -> Path:
    """A model's folder with a tokenizer for its hundred words."""
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, **{f"w{i}": i for i in range(1, 100)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="w1")
    whole.save_pretrained(folder)
    return folder


def base(folder: Path) -> Path:
    """A tiny BERT as bases are published: without a head, with a tokenizer."""
    models.build("bert").bert.save_pretrained(folder)
    return with_tokenizer(folder)


def readme(folder: Path) -> dict[str, Any]:
    (folder / "examples").mkdir()
    (folder / "examples/minilm.yaml").symlink_to(ROOT / "examples/minilm.yaml")
    return {"transformers": transformers, "minilm": base(folder / "MINILM")}


def artifact(folder: Path) -> dict[str, Any]:
    spec = {**ATTACHED, "model": {"labels": ["bad", "good"]}}
    model = with_tokenizer(models.save("bert", folder / "model"))
    peltc.compile(spec, model, folder / "out", verify=False)
    return {"ids": torch.tensor(IDS), "mask": torch.ones(2, 3, dtype=torch.long)}


def generation(folder: Path) -> dict[str, Any]:
    peltc.compile(ATTACHED, models.save("llama", folder / "model"), folder / "out", verify=False, generation=True)
    return {"ids": torch.tensor(IDS), "mask": torch.ones(2, 3, dtype=torch.long)}


def training(folder: Path) -> dict[str, Any]:
    base(folder / "model")
    (folder / "spec.yaml").write_text(blocks("docs/training.md", "yaml")[0][1])
    return {}


def own_module(folder: Path) -> dict[str, Any]:
    (folder / "spec.yaml").write_text("pelt: 1\nattach:\n  - {method: lora, at: attention.query}\n")
    given = foreign.inputs()
    return {"module": foreign.build("mosaic"), "ids": given["input_ids"], "mask": given["attention_mask"]}


def profiles(folder: Path) -> dict[str, Any]:
    peltc.compile(ATTACHED, models.save("bert", folder / "model"), folder / "out", verify=False, mode="swappable")
    tensors = load_file(folder / "out/adapter.safetensors")
    save_file(tensors, folder / "bob.safetensors")
    linker = Linker(folder / "out")
    write_profile(folder / "ada.onnx_adapter", linker.link(tensors), linker.record["fingerprint"])
    blending = {**ATTACHED, "deploy": {"mode": "bank", "blend": True}}
    peltc.compile(blending, folder / "model", folder / "bank", verify=False)
    linker = Linker(folder / "bank")
    write_profile(folder / "ada_bank.onnx_adapter", linker.link(tensors), linker.record["fingerprint"])
    masks = {"pelt": 1, "attach": [{"recipe": "xpeft", "n": 4, "k": 2}]}
    for name, spec in (("lora_bank", ATTACHED), ("xpeft_bank", masks)):
        peltc.compile(spec, folder / "model", folder / name, verify=False, mode="bank")
    ids = np.array(IDS)
    given = {"ids": ids, "mask": np.ones_like(ids), "onnxruntime": onnxruntime}
    return {**given, "feeds": {"input_ids": ids, "attention_mask": given["mask"], "token_type_ids": 0 * ids}}


def importing(folder: Path) -> dict[str, Any]:
    peltc.compile({**ATTACHED, "name": "ada"}, models.save("bert", folder / "model"), folder / "bank", verify=False,
                  mode="bank")  # fmt: skip
    linker, ids = Linker(folder / "bank"), np.array([*IDS, IDS[0]])
    linked = linker.link(load_file(folder / "bank/adapter.safetensors"))
    write_profile(folder / "bob.onnx_adapter", linked, linker.record["fingerprint"])
    return {"np": np, "ids": ids, "mask": np.ones_like(ids)}


def serving(folder: Path) -> dict[str, Any]:
    """Two servers, which end with the tests; one of them generates."""
    found = {}
    for name, family, out in (("address", "bert", "out"), ("llama", "llama", "chat")):
        model = with_tokenizer(models.save(family, folder / family))
        peltc.compile({**ATTACHED, "name": "minilm" if family == "bert" else family}, model, folder / out, verify=False,
                      mode="bank", generation=family == "llama")  # fmt: skip
        store, addresses = peltc.ProfileStore(folder / f"STORE-{out}", folder / out), queue.SimpleQueue[str]()
        store.put("acme/ada", next((folder / out / "profiles").glob("*.onnx_adapter")))
        session = peltc.Session(folder / out, store=store)
        threading.Thread(target=serve, args=(session,), kwargs={"port": 0, "ready": addresses.put}, daemon=True).start()
        found[name] = addresses.get(timeout=60).split("/")[2]
    return found


def triton(folder: Path) -> dict[str, Any]:
    peltc.compile({**ATTACHED, "name": "minilm"}, models.save("bert", folder / "model"), folder / "out", verify=False,
                  mode="bank")  # fmt: skip
    shutil.copy(folder / "out/profiles/minilm.onnx_adapter", folder / "ada.onnx_adapter")
    return {}


def senses(folder: Path) -> dict[str, Any]:
    """An artifact of a model that reads images, with its processor, and an image."""
    import beyond
    from PIL import Image

    beyond.save("vit", folder / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    peltc.compile(spec, folder / "vit", folder / "out")
    Image.new("RGB", (50, 40), "orange").save(folder / "cat.png")
    return {}


PREPARED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": readme, "docs/artifact.md": artifact, "docs/generation.md": generation,
    "docs/training.md": training, "docs/models.md": own_module, "docs/profiles.md": profiles,
    "docs/import.md": importing, "docs/serving.md": serving, "docs/triton.md": triton,
    "docs/senses.md": senses,
}  # fmt: skip
"""What stands ready in a page's folder, and the names that its blocks do not make themselves."""


def test_every_page_with_python_is_run() -> None:
    assert {page for page in PAGES if blocks(page, "python", "py")} == set(PREPARED)


@pytest.mark.parametrize("page", PREPARED)
@pytest.mark.filterwarnings("ignore")
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page; commands on a console between them too."""
    monkeypatch.chdir(tmp_path)
    names = {"peltc": peltc, **PREPARED[page](tmp_path)}
    for language, text in blocks(page, "python", "console"):
        if language == "python":
            exec(compile(text, page, "exec"), names)
            continue
        for words in commands_of(text):
            program, *rest = words
            verb = ["compile"] if program == "pelt-compile" else []
            assert run([*verb, *rest]) == 0, words


# commands

INLINE = re.compile(r"(?<!`)`((?:pelt|pelt-compile) [^`]+)`(?!`)")


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands in a block, or on indented lines."""
    for line in text.splitlines():
        if re.match(r"(\$ |    |)(pelt|pelt-compile) ", line):
            yield shlex.split(line.strip().removeprefix("$ "), comments=True)


def commands(page: str) -> Iterator[list[str]]:
    """The commands that a page shows: on consoles, on indented lines, and in its sentences."""
    text = PAGES[page].read_text(encoding="utf-8")
    shown = (block for _, language, block in FENCE.findall(text) if language in ("console", "sh", ""))
    yield from (words for block in shown for words in commands_of(block))
    plain = FENCE.sub("", text)
    yield from (words for line in plain.splitlines() if line.startswith("    ") for words in commands_of(line))
    yield from (shlex.split(found.replace("\n", " ")) for found in INLINE.findall(plain))


def unknown(words: list[str]) -> list[str]:
    """What of a command there is not: its verb, or options."""
    program, *rest = words
    verb = "compile" if program == "pelt-compile" else rest.pop(0)
    if verb.startswith("-"):
        return [] if verb == "--help" else [verb]
    if verb not in cli.commands:
        return [verb]
    options, command = {"-h", "--help"}, cli.commands[verb]
    if isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            return rest[:1] or [verb]
        command = command.commands[rest.pop(0)]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            options |= {*parameter.opts, *parameter.secondary_opts}
    return [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    assert {" ".join(words): wrong for words in commands(page) if (wrong := unknown(words))} == {}


def test_commands_that_there_are_not_are_seen() -> None:
    assert unknown(["pelt", "compile", "a", "b", "--nothing", "-o", "out"]) == ["--nothing"]
    assert unknown(["pelt", "profiles", "fly"]) == ["fly"]
    assert unknown(["pelt", "fly"]) == ["fly"] and unknown(["pelt-compile", "a", "b", "-o", "out"]) == []
    assert sum(len(list(commands(page))) for page in PAGES) > 15
