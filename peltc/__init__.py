"""peltc: parameter-efficient fine-tuning modules, compiled into ONNX deployments.

    import peltc

    spec = peltc.load_spec("spec.yaml")
    model = peltc.attach(model, spec)               # train it with transformers.Trainer, then model.save_adapter(...)
    peltc.compile(spec, "model/", "out/", weights="adapter.safetensors")
    outputs = peltc.Session("out/")(input_ids=ids, attention_mask=mask)

Everything is imported when first used: reading a spec needs no torch, and neither does compiling on a known base.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peltc.compiler.plan.claims import Plan as Plan
    from peltc.compiler.survey.anatomy import Anatomy as Anatomy
    from peltc.compiler.survey.anatomy import Site as Site
    from peltc.runtime.api import link as link
    from peltc.runtime.api import plan as plan
    from peltc.runtime.api import survey as survey
    from peltc.runtime.building.adapters import combine as combine
    from peltc.runtime.building.adapters import export_peft as export_peft
    from peltc.runtime.building.compile import compile as compile
    from peltc.runtime.building.compile import verify as verify
    from peltc.runtime.running.records import StoreLimits as StoreLimits
    from peltc.runtime.running.session import Session as Session
    from peltc.runtime.running.store import ProfileStore as ProfileStore
    from peltc.runtime.serving.limits import ServingLimits as ServingLimits
    from peltc.runtime.serving.ray_app import ray_app as ray_app
    from peltc.runtime.serving.server import serve as serve
    from peltc.runtime.training.attach import attach as attach
    from peltc.runtime.training.loop import consistency_loss as consistency_loss
    from peltc.runtime.training.loop import parameter_groups as parameter_groups
    from peltc.runtime.triton.configs import TritonTuning as TritonTuning
    from peltc.runtime.triton.repository import export_triton as export_triton
    from peltc.spec.diagnostics import Diagnostic as Diagnostic
    from peltc.spec.diagnostics import PeltError as PeltError
    from peltc.spec.specification import Spec as Spec
    from peltc.spec.specification import load_spec as load_spec

_WHERE = {
    "load_spec": "peltc.spec.specification",
    "Spec": "peltc.spec.specification",
    "PeltError": "peltc.spec.diagnostics",
    "Diagnostic": "peltc.spec.diagnostics",
    "Anatomy": "peltc.compiler.survey.anatomy",
    "Site": "peltc.compiler.survey.anatomy",
    "Plan": "peltc.compiler.plan.claims",
    "survey": "peltc.runtime.api",
    "plan": "peltc.runtime.api",
    "link": "peltc.runtime.api",
    "compile": "peltc.runtime.building.compile",
    "combine": "peltc.runtime.building.adapters",
    "export_peft": "peltc.runtime.building.adapters",
    "export_triton": "peltc.runtime.triton.repository",
    "verify": "peltc.runtime.building.compile",
    "attach": "peltc.runtime.training.attach",
    "Session": "peltc.runtime.running.session",
    "ProfileStore": "peltc.runtime.running.store",
    "StoreLimits": "peltc.runtime.running.records",
    "ServingLimits": "peltc.runtime.serving.limits",
    "serve": "peltc.runtime.serving.server",
    "ray_app": "peltc.runtime.serving.ray_app",
    "TritonTuning": "peltc.runtime.triton.configs",
    "consistency_loss": "peltc.runtime.training.loop",
    "parameter_groups": "peltc.runtime.training.loop",
}

__all__ = [
    "Anatomy", "Diagnostic", "PeltError", "Plan", "ProfileStore", "ServingLimits", "Session", "Site", "Spec",
    "StoreLimits", "TritonTuning", "attach", "combine", "compile", "consistency_loss", "export_peft", "export_triton",
    "link", "load_spec", "parameter_groups", "plan", "ray_app", "serve", "survey", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("peltc")
    if name in _WHERE:
        from peltc.spec.packages import needing

        with needing(f"peltc.{name}"):
            return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'peltc' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
