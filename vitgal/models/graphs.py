"""CUDA graphs: the kernels of a computation, recorded once a shape and then launched together."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT = 32  # graphs; each keeps its input and its results on the GPU


class Graphs:
    """Runs a computation on a GPU as CUDA graphs, which spare the processor thousands of launches.

    The first input of a shape runs as it is, the second is recorded, and from then on the recording
    runs. After `KEPT` shapes the one that was used longest ago is recorded anew when it returns.
    Where a recording fails, for want of memory for instance, a warning says so and everything runs
    as it is. On a CPU nothing is recorded. Not thread-safe.

    compute: from a tensor to tensors and a last value that depends on the input's shape alone. It
    must not wait for the GPU.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Any, ...]]) -> None:
        self._compute = compute
        self._shapes: set[torch.Size] = set()
        self._graphs: OrderedDict[torch.Size, tuple] = OrderedDict()
        self._pool: tuple[int, int] | None = None
        self._usable = True

    def __call__(self, inputs: Tensor) -> tuple[Any, ...]:
        """Computes the results for `inputs`; they are the caller's own."""
        shape = inputs.shape
        if not (self._usable and inputs.device.type == "cuda"):
            return self._compute(inputs)
        if shape not in self._shapes:
            self._shapes.add(shape)
            return self._compute(inputs)
        if shape not in self._graphs and not self._record(inputs):
            return self._compute(inputs)
        self._graphs.move_to_end(shape)
        graph, recorded_input, (*tensors, facts) = self._graphs[shape]
        recorded_input.copy_(inputs)
        graph.replay()
        # The next run overwrites the graph's own results.
        return *(tensor.clone() for tensor in tensors), facts

    def _record(self, inputs: Tensor) -> bool:
        """Records the computation for a shape; returns whether it could."""
        while len(self._graphs) >= KEPT:
            self._graphs.popitem(last=False)
        graph, own_input = torch.cuda.CUDAGraph(), inputs.clone()
        # Without its cache autocast's casts are part of the graph, whatever context it runs in.
        cast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        try:
            # One pool: no two graphs run at once, and their results are copied.
            with cast, torch.cuda.graph(graph, pool=self._pool):
                results = self._compute(own_input)
        except RuntimeError as error:  # what torch raises for CUDA, torch.OutOfMemoryError too
            self._usable = False
            self._graphs.clear()
            warnings.warn(f"CUDA graphs are not used from here on: {error}", stacklevel=2)
            return False
        self._pool = self._pool or graph.pool()
        self._graphs[inputs.shape] = graph, own_input, results
        return True
