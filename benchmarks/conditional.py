"""What a conditional node of a CUDA graph costs, built through `cuda.bindings` where that is."""

from collections.abc import Callable
from typing import Any

import torch

IFS = 100


def if_node_us(seconds: Callable[[Callable[[], Any], str], float]) -> dict[str, Any]:
    """Microseconds per IF node in a chain of them, taken and not taken; else why not.

    Args:
        seconds: measures a call on a device.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        return {"skipped": f"cuda.bindings cannot be imported ({error})"}
    torch.cuda.init()
    stream = torch.cuda.current_stream().cuda_stream
    found: dict[str, Any] = {}
    for name, value in (("taken", 1), ("not_taken", 0)):
        try:
            launched = _chain(runtime, value)
            took = seconds(lambda g=launched: _ok(runtime.cudaGraphLaunch(g, stream)), "cuda")
            found[name] = took / IFS * 1e6
        except Exception as error:  # this is a probe of an interface that differs by version
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _chain(runtime: Any, value: int) -> Any:
    """An executable graph of `IFS` conditional nodes, each behind the one before it."""
    graph = _ok(runtime.cudaGraphCreate(0))
    before: list[Any] = []
    for _ in range(IFS):
        # Every launch starts from `value`, so no kernel has to set it.
        handle = _ok(runtime.cudaGraphConditionalHandleCreate(graph, value, 1))
        given = runtime.cudaGraphNodeParams()
        given.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        given.conditional.handle = handle
        given.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        given.conditional.size = 1
        try:
            node = _ok(runtime.cudaGraphAddNode(graph, before, len(before), given))
        except TypeError:  # CUDA 13 also takes what is known of the edges
            node = _ok(runtime.cudaGraphAddNode(graph, before, None, len(before), given))
        _ok(runtime.cudaGraphAddEmptyNode(given.conditional.phGraph_out[0], [], 0))
        before = [node]
    return _ok(runtime.cudaGraphInstantiate(graph, 0))


def _ok(returned: Any) -> Any:
    """The value that came with an error code; raises if that is not success."""
    error, *values = returned
    if int(error) != 0:
        raise RuntimeError(str(error))
    return values[0] if values else None
