"""ONNX Runtime's own CUDA provider on a machine without a device: its kernels, and where it places nodes.

The provider is the wheel's. What it links, the libraries of CUDA, is stood in for by functions that do nothing, one for
each name that the provider imports, so that it opens and decides; nothing can be computed by it, and nothing is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

PROVIDERS = Path(onnxruntime.__file__).parent / "capi"
LINKED = ("cuda", "tensorrt")  # the second for the list of kernels, which asks every provider of the wheel
NEEDED = ("gcc", "nm")
WITHOUT_VERSIONS = {
    "libcuda.so.1": ["cuTensorMapEncodeTiled"],
    "libcurand.so.10": [],
    "libnvinfer.so.10": ["createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                         "getInferLibVersion", "getPluginRegistry"],
    "libnvonnxparser.so.10": ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"],
}  # fmt: skip
"""Libraries whose names carry no version in the provider, so that `nm` does not tell which library they are of."""
ANSWERS = {
    "cudaGetDeviceCount": "(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "(int *n) { *n = 0; return 0; }",
    # 308: warpSize, 360: the compute capability's major part, 9 of an H100; see cudaDeviceProp in driver_types.h
    "cudaGetDeviceProperties": "(char *p)"
    " { memset(p, 0, 512); *(int *)(p + 308) = 32; *(int *)(p + 360) = 9; return 0; }",
    "cudaMemGetInfo": "(size_t *free, size_t *all) { *free = *all = (size_t)8 << 30; return 0; }",
    "cudaDriverGetVersion": "(int *n) { *n = 13000; return 0; }",
    "cudaRuntimeGetVersion": "(int *n) { *n = 13000; return 0; }",
    "cudaDeviceGetAttribute": "(int *v, int which) { *v = which == 75 ? 9 : 0; return 0; }",
    "cudaMemcpy": "(void *to, void *from, size_t n) { memcpy(to, from, n); return 0; }",
    "cudaMemcpyAsync": "(void *to, void *from, size_t n) { memcpy(to, from, n); return 0; }",
    **dict.fromkeys(("cudaMalloc", "cudaMallocHost", "cudaHostAlloc"),
                    "(void **p, size_t n) { *p = malloc(n); return 0; }"),
    **dict.fromkeys(("cudaFree", "cudaFreeHost"), "(void *p) { free(p); return 0; }"),
    **dict.fromkeys(("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreateWithFlags",
                     "cublasCreate_v2", "cublasLtCreate", "cudnnCreate"), "(void **p) { *p = (void *)1; return 0; }"),
}  # fmt: skip
"""Bodies in C of the functions that a provider reads something from; every other one returns 0, success."""
TEXTS = ("cudaGetErrorName", "cudaGetErrorString", "cublasGetStatusName", "cublasGetStatusString")


def missing() -> str:
    """Why the provider cannot be opened here, or ""."""
    if not (PROVIDERS / "libonnxruntime_providers_cuda.so").is_file():
        return "onnxruntime-gpu is not installed"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


@cache
def libraries(folder: Path) -> Path:
    """A folder with stand-ins for all that the providers of the wheel link."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {library: set(listed) for library, listed in WITHOUT_VERSIONS.items()}
    for provider in LINKED:
        file = PROVIDERS / f"libonnxruntime_providers_{provider}.so"
        listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True)
        for name, library in re.findall(r" U (\w+)@(libcu\w+\.so\.\d+)$", listed.stdout, re.MULTILINE):
            names.setdefault(library, set()).add(name)
    for library, functions in names.items():
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        lines = [f"const char *{f}(void) {{ return \"none\"; }}" if f in TEXTS else
                 f"int {f}{ANSWERS.get(f, '(void) { return 0; }')}" for f in sorted(functions)]  # fmt: skip
        source.write_text("\n".join(["#include <stdlib.h>", "#include <string.h>", *lines, ""]), encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        versioned = [] if library in WITHOUT_VERSIONS else [f"-Wl,--version-script={versions}"]
        subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-o", folder / library, source,
                        f"-Wl,-soname,{library}", *versioned], check=True)  # fmt: skip
    return folder


def asked(folder: Path, script: str, *arguments: str | Path, strict: bool = True) -> list[Any]:
    """What a Python script prints, a line of JSON for each thing, in a process of its own, which has the stand-ins.

    Args:
        folder: where the stand-ins are, or are to be.
        script: a file of this folder, or any other.
        strict: whether it may not end in a fault.
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries(folder))}
    found = subprocess.run([sys.executable, Path(__file__).parent / script, *map(str, arguments)], env=environment,
                           capture_output=True, text=True, check=False, timeout=300)  # fmt: skip
    if found.returncode and strict:
        raise RuntimeError(f"{script}: {found.returncode}\n{found.stderr[-2000:]}")
    return [json.loads(line) for line in found.stdout.splitlines()]


def numbered(file: Path) -> ir.Model:
    """A graph whose nodes have numbers for names, written beside it."""
    model = ir.load(file)
    for i, node in enumerate(model.graph):
        node.name = str(i)
    ir.save(model, file.with_suffix(".numbered"))
    return model
