"""How a function on the GPU is recorded as a CUDA graph, with the memory that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """How functions are recorded; `CudaCapture` is the real one."""

    def warm_up(self, run: Callable[[], Any]) -> None: ...

    def record(self, run: Callable[[], tuple]) -> tuple[Callable[[], None], tuple]:
        """(a function that does it again, into the same tensors; the results)."""

    def forget(self) -> None:
        """Nothing that was recorded will be done again: what is recorded next gets other memory."""


class CudaCapture:
    """Records CUDA graphs, all from one stream and one memory pool: they replace each other's temporary tensors.

    cuBLAS's workspaces are forgotten before and after, so that one made while recording is a temporary tensor of the pool, too.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run it for real on the recording stream: compiles, plans and scratch buffers may not be made while recording.

        Then again, where an operation that makes the host wait is an error: it would break the recording off, and a recording that
        breaks off leaves torch (before 2.12) with allocators that still take it to be under way.
        """
        _forget_workspaces()
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], tuple]) -> tuple[Callable[[], None], tuple]:
        graph = torch.cuda.CUDAGraph()
        device = self._stream.device_index
        generator, stream = torch.cuda.default_generators[device], torch.cuda.current_stream(device)
        state = generator.clone_state()
        _forget_workspaces()
        try:
            # Only this thread has to behave: a data loader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = run()
        except BaseException:
            generator.graphsafe_set_state(state)  # a capture that broke off leaves it waiting for the capture's end
            torch.cuda.set_stream(stream)  # and the recording stream in force
            raise
        finally:
            _forget_workspaces()
        return graph.replay, results


def _forget_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()  # as torch's own trees of graphs do
