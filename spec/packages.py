"""Packages that only some uses need: what is missing is said with the use that asks for it, and how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peltc.spec.diagnostics import PeltError, fail

PACKAGES = {
    "torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "psutil": "psutil", "onnx": "onnx",
    "onnx_ir": "onnx-ir", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime", "safetensors": "safetensors",
    "networkx": "networkx", "yaml": "pyyaml", "jsonschema": "jsonschema", "numpy": "numpy", "ml_dtypes": "ml_dtypes",
    "click": "click", "tqdm": "tqdm", "tokenizers": "tokenizers", "starlette": "starlette",
    "uvicorn": "uvicorn", "prometheus_client": "prometheus-client",
    "grpc": "grpcio", "tritonclient": "tritonclient", "ray": "ray[serve]",
    "PIL": "pillow", "soundfile": "soundfile",
}  # fmt: skip
"""What `pip` calls the packages that the project imports, by what Python calls them."""
EXTRAS = {
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "grpc": "serve",
    "tritonclient": "serve",
    "ray": "ray",
    "PIL": "senses",
    "soundfile": "senses",
}
"""Those that the project installs when they are asked for alone, and by what name."""


@contextmanager
def needing(use: str) -> Iterator[None]:
    """Say in plain words which package a use needs, where it is not installed.

    Args:
        use: what needs it, as the subject of a sentence: `Session.tokenize`.

    Raises:
        PeltError: E623.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if found := missing(error, use):
            raise found from error
        raise


def missing(error: ModuleNotFoundError, use: str) -> PeltError | None:
    """The finding for a package of ours that is not installed; None for any other, which is a fault of somebody's."""
    name = (error.name or "").partition(".")[0]
    if name not in PACKAGES:
        return None
    if extra := EXTRAS.get(name):
        return fail("E623", f"{use} needs the package '{name}', which is not installed",
                    expected=f"a package of the extra `{extra}`", hint=f"pip install 'peltc[{extra}]'")  # fmt: skip
    also = ", or onnxruntime-gpu" if name == "onnxruntime" else ""
    return fail("E623", f"{use} needs the package '{name}', which is not installed",
                expected="a package of those that peltc installs, unless by --no-deps",
                hint=f"pip install {PACKAGES[name]}{also}")  # fmt: skip
