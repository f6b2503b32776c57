"""Real processes with a gloo group, kept for the whole session: starting one costs seconds of imports."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECONDS = 200.0  # a step of any test takes a second on an idle machine: beyond this a rank waits for one that is gone
MOST = 3


def _serve(pipe: Any, rank: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # its default group is the one that there is when it is first imported: none yet

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        size, store, function, arguments = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            dist.barrier()  # a rank whose work is short must not leave while others still connect to it
            result = True, function(rank, size, *arguments)
        except BaseException:
            result = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(result)


class Ranks:
    """run(size, function, *arguments): function(rank, size, *arguments) in so many processes at once, what they return
    in order of rank. `function` lives at the top of a module."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder, self.calls, self.pipes, self.processes = folder, 0, [], []
        for rank in range(MOST):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.calls += 1
        for pipe in self.pipes[:size]:
            pipe.send((size, str(self.folder / f"store{self.calls}"), function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(SECONDS):
                self.close()
                pytest.fail(f"rank {rank} of {size} hangs in {function.__name__}")
            results.append(pipe.recv())
        # Only now: an answer left in its pipe would be taken for that of the next call.
        for rank, (right, result) in enumerate(results):
            if not right:
                pytest.fail(f"rank {rank} of {size}:\n{result}")
        return [result for _, result in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
