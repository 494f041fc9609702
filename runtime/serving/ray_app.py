"""An artifact as an application of Ray Serve: any number of replicas on any number of machines, each of which is the
server that `pelt serve` starts, behind Ray's own door."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peltc.compiler.files.manifest import read_manifest
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.service import Allow
from peltc.spec.packages import needing


def ray_app(
    out: str | Path,
    store: str | Path | None = None,
    resident: int = 64,
    limits: ServingLimits | None = None,
    allow: Allow | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`, or for the command `serve run`.

    Each replica opens the artifact and the store in a process of its own, joins its requests in batches, and has its
    own profiles in memory. A request is for one replica as a whole.

    Args:
        out: the artifact's folder, which each machine has at this path.
        store: the path of a store of profiles; each machine has it too.
        resident: how many profiles are in a replica's memory at most.
        limits: of each replica.
        allow: whether a caller may use a profile, as for `peltc.serve`.
        providers: execution providers, as for `Session`.
        threads: threads of one operator; as many as the CPUs that a replica takes, where absent.
        options: those of `ray.serve.deployment`, `num_replicas` and `autoscaling_config` say.

    Raises:
        PeltError: E603 no artifact; E623 Ray is not installed. What else is wrong with the artifact, a replica says.
    """
    with needing("peltc.ray_app"):
        from ray import serve
    folder, bounds = Path(out).resolve(), limits or ServingLimits()
    name = str(read_manifest(folder)["name"])
    file = None if store is None else Path(store).resolve()
    taken = (options.get("ray_actor_options") or {}).get("num_cpus", 1)
    workers = threads if threads is not None else max(1, math.ceil(taken))

    def replica() -> Any:
        from peltc.runtime.running.session import Session
        from peltc.runtime.serving.app import build
        from peltc.runtime.serving.service import Service

        session = Session(folder, providers, threads=workers, spinning=False, store=file, resident=resident)
        return build(Service(session, bounds, allow))

    ours = {"name": name, "max_ongoing_requests": bounds.queue, "graceful_shutdown_timeout_s": bounds.grace}
    return serve.deployment(**{**ours, **options})(serve.ingress(replica)()).bind()
