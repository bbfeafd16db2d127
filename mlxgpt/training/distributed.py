"""Training on several machines or processes, on MLX's own communication (ring, MPI, JACCL or NCCL)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..common import cli

if TYPE_CHECKING:
    from .watch import Watch

Tree = TypeVar("Tree")


class Group:
    """The processes that train together, of which this one has a rank; as a context manager it says how it ends.

    Every method but `fail` and `close` must be called on all ranks, in the same order. A group of one costs nothing.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)
        self.names = ["rank 0"]  # of each rank, as errors give it: rank 1 (mac2.local)
        self.watch: Watch | None = None

    @property
    def name(self) -> str:
        return self.names[self.rank]

    def average(self, arrays: Tree) -> Tree:
        """The mean over the ranks of each array of a tree, evaluated: new arrays, the same bits on all ranks."""
        if self._group is None:
            return arrays
        from mlx.nn import average_gradients

        return self._evaluated(average_gradients(arrays, self._group))

    def broadcast(self, arrays: Tree) -> Tree:
        """Rank 0's arrays, on every rank: a tree of the same shapes, evaluated."""
        if self._group is None:
            return arrays
        ours = arrays if self.rank == 0 else tree_map(mx.zeros_like, arrays)
        return self._evaluated(tree_map(lambda a: mx.distributed.all_sum(a, group=self._group), ours))

    def sum(self, *values: float) -> list[float]:
        """The sum over the ranks of each value, in float64 and in order of the ranks."""
        if self._group is None:
            return list(values)
        gathered = [np.frombuffer(data) for data in self._gather(np.array(values, np.float64).tobytes())]
        return [math.fsum(column) for column in zip(*gathered, strict=True)]

    def mean(self, *values: float) -> list[float]:
        """The mean over the ranks of each value."""
        return [value / self.size for value in self.sum(*values)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.sum(flag)[0] > 0

    def agree(self, what: Mapping[str, Any]) -> None:
        """ValueError, the same on every rank, for a value that differs from rank 0's; returns when all are here."""
        if self._group is None:
            return
        shown = {name: repr(value) for name, value in what.items()}
        first, *others = [json.loads(data) for data in self.gather(json.dumps(shown).encode())]
        for rank, theirs in enumerate(others, 1):
            for name in {**first, **theirs}:
                value, expected = theirs.get(name, "not there"), first.get(name, "not there")
                if value != expected:
                    raise ValueError(f"{name} is {value} on {self.names[rank]}, but {expected} on {self.names[0]}")

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gave, in their order; of any length."""
        if self._group is None:
            return [data]
        lengths = [int.from_bytes(n, "big") for n in self._gather(len(data).to_bytes(8, "big"))]
        padded = self._gather(data.ljust(max(1, *lengths), b"\0"))
        return [theirs[:n] for theirs, n in zip(padded, lengths, strict=True)]

    def on_death(self, function: Callable[[], None]) -> None:
        """What to do before this process ends because another has, in a thread of its own and with a time limit."""
        if self.watch:
            self.watch.on_death = function

    def close(self) -> None:
        """Takes leave of the others, who then do not take this process for dead when it ends."""
        if self.watch:
            self.watch.close()
            self.watch = None

    def fail(self, message: str) -> None:
        """Tells the others that this rank ends by an error, which ends them too; rank 0 prints it if not its own."""
        if self.watch:
            self.watch.fail(message)
            self.watch = None

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
            return
        if self.watch is None:
            return
        self.fail("interrupted" if isinstance(error, KeyboardInterrupt) else cli.describe(error))
        expected = isinstance(error, (cli.UsageError, ValueError, OSError, MemoryError))
        if self.rank and expected and os.environ.get("MLXGPT_TRACEBACK") != "1":
            raise SystemExit(2 if isinstance(error, cli.UsageError) else 1)  # rank 0 has printed it, for all

    def _gather(self, data: bytes) -> list[bytes]:
        """The same of data of one length on all ranks."""
        array = mx.array(np.frombuffer(data, np.uint8))
        gathered = self._evaluated(mx.distributed.all_gather(array, group=self._group))
        return [row.tobytes() for row in np.array(gathered).reshape(self.size, len(data))]

    def _evaluated(self, arrays: Tree) -> Tree:
        """Waits for a collective operation. ConnectionError if it fails and the watch knows of no death."""
        try:
            mx.eval(arrays)
        except RuntimeError as error:
            if self.watch:
                self.watch.await_verdict()
            raise ConnectionError(f"{self.name}: MLX lost the connection to another rank: {error}") from None
        return arrays


def start(prog: str = "mlxgpt.train") -> Group:
    """The group that this process was launched into, by mlx.launch or an MPI's own launcher; else one of its own.

    `prog` begins the line on stderr in which a rank's death or error is told. ConnectionError when the others can't
    be reached.
    """
    backend = _backend(os.environ)
    if backend is None:
        return Group()
    import socket

    from . import watch

    late = f"{prog}: error: {socket.gethostname()}: MLX could not connect all ranks in {watch.START:.0f} s"
    try:
        with watch.guarded(f"{late}; are their addresses in the hostfile right, and open to each other?"):
            group = Group(mx.distributed.init(strict=True, backend=backend))
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"distributed: MLX's backend {backend} does not start: {error}") from None
    hosts = [host.decode(errors="replace") for host in group.gather(socket.gethostname().encode())]
    group.names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    if group.size > 1:
        group.watch = watch.meet(group.rank, group.names, group.gather, prog)
    return group


def _backend(environment: Mapping[str, str]) -> str | None:
    """The backend of MLX's that a process was launched for, by the variables its launcher sets; None for none.

    (Asking MLX to find out would try all of them, and with none end in a silent group of one on each rank.)
    """
    if "MLX_RANK" in environment:
        if "MLX_JACCL_COORDINATOR" in environment:
            return "jaccl"
        if "NCCL_HOST_IP" in environment:
            return "nccl"
        path = environment.get("MLX_HOSTFILE")
        if path and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return "ring" if file.read().strip() else None  # mlx.launch -n 1 leaves it empty
    sizes = (environment.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))  # Open MPI's, MPICH's
    return "mpi" if any(size != "1" for size in sizes) else None


def share(batch_size: int, gradient_accumulation_steps: int, rank: int, size: int) -> list[range]:
    """The windows of one optimizer step that a rank takes, of all ranks' 0 .. batch_size
    gradient_accumulation_steps - 1: a range for each of its micro-batches.

    Whole micro-batches where they come out even, every size-th one; else a part of each. The mean over the ranks of
    their mean loss is then the mean over all windows. ValueError where neither comes out even.
    """
    starts = range(0, batch_size * gradient_accumulation_steps, batch_size)
    if gradient_accumulation_steps % size == 0:
        return [range(start, start + batch_size) for start in starts[rank::size]]
    if batch_size % size == 0:
        part = batch_size // size
        return [range(start + rank * part, start + (rank + 1) * part) for start in starts]
    raise ValueError(
        f"batch_size is {batch_size} and gradient_accumulation_steps {gradient_accumulation_steps}, "
        f"expected one of them to be a multiple of the {size} ranks"
    )
