"""What ONNX Runtime's CUDA provider says of graphs, as lines of JSON: run by `driverless.asked`.

    python tests/gpu/placing.py GRAPH.onnx ...

Of each graph, whose nodes have numbers for names: those that are not on the device, how many copies there are between
it and the machine's memory, and whether a CUDA graph is accepted; or why it cannot be opened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import onnxruntime as ort

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def placed(file: Path) -> dict[str, object]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # each node as it is
    options.optimized_model_filepath = str(file.with_suffix(".placed"))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(str(file), options, [CUDA, CPU])
    except Exception as error:
        return {"refused": str(error)[:300]}
    parts = session.get_provider_graph_assignment_info()
    off = [node.name for part in parts if part.ep_name != CUDA for node in part.get_nodes()]
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    copies = sum(node.op_type.startswith("Memcpy") for node in nodes)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(file), options, [(CUDA, {"enable_cuda_graph": "1"}), CPU])
    except Exception as error:
        return {"off": off, "copies": copies, "captured": str(error)[:300]}
    return {"off": off, "copies": copies, "captured": True}


for argument in sys.argv[1:]:
    print(json.dumps(placed(Path(argument))), flush=True)
