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
    """The processes that train together, each with a rank. As a context manager it tells the others how this process
    ends.

    All ranks must call every method but `fail` and `close`, in the same order. A group of one costs nothing.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)
        self.names = ["rank 0"]  # of all ranks, as messages show them: rank 1 (mac2.local)
        self.watch: Watch | None = None

    @property
    def name(self) -> str:
        return self.names[self.rank]

    def average(self, arrays: Tree) -> Tree:
        """The mean over the ranks of each array in a tree, evaluated: new arrays, with the same bits on all ranks."""
        if self._group is None:
            return arrays
        from mlx.nn import average_gradients

        return self._evaluated(average_gradients(arrays, self._group))

    def broadcast(self, arrays: Tree) -> Tree:
        """A tree of rank 0's arrays, evaluated, on every rank; the others pass a tree of the same shapes."""
        if self._group is None:
            return arrays
        terms = arrays if self.rank == 0 else tree_map(mx.zeros_like, arrays)
        return self._evaluated(tree_map(lambda a: mx.distributed.all_sum(a, group=self._group), terms))

    def sum(self, *values: float) -> list[float]:
        """The sum over the ranks of each value, in float64, added up in the order of the ranks."""
        if self._group is None:
            return list(values)
        gathered = [np.frombuffer(data) for data in self._gather(np.array(values, np.float64).tobytes())]
        return [math.fsum(column) for column in zip(*gathered, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum(flag)[0] > 0

    def agree(self, what: Mapping[str, Any]) -> None:
        """Compares values by name between the ranks, and returns when all ranks have called it. ValueError, the same
        on every rank, for a value that differs from rank 0's."""
        if self._group is None:
            return
        shown = {name: repr(value) for name, value in what.items()}
        first, *others = [json.loads(data) for data in self.gather(json.dumps(shown).encode())]
        for rank, other in enumerate(others, 1):
            for name in {**first, **other}:
                value, expected = other.get(name, "not there"), first.get(name, "not there")
                if value != expected:
                    raise ValueError(f"{name} is {value} on {self.names[rank]}, but {expected} on {self.names[0]}")

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes that each rank gave, of any length, in the order of the ranks."""
        if self._group is None:
            return [data]
        lengths = [int.from_bytes(n, "big") for n in self._gather(len(data).to_bytes(8, "big"))]
        padded = self._gather(data.ljust(max(1, *lengths), b"\0"))
        return [given[:n] for given, n in zip(padded, lengths, strict=True)]

    def on_death(self, function: Callable[[], None]) -> None:
        """Sets what this process does before it ends because another has died: in a thread, with a time limit."""
        if self.watch:
            self.watch.on_death = function

    def close(self) -> None:
        """Tells the others that this process ends as it should, so that they don't take it for dead."""
        if self.watch:
            self.watch.close()
            self.watch = None

    def fail(self, message: str) -> None:
        """Tells the others that this rank ends by an error, which ends them too; rank 0 prints the
        message of another."""
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
        """gather() of data that has the same length on all ranks."""
        array = mx.array(np.frombuffer(data, np.uint8))
        gathered = self._evaluated(mx.distributed.all_gather(array, group=self._group))
        return [row.tobytes() for row in np.array(gathered).reshape(self.size, len(data))]

    def _evaluated(self, arrays: Tree) -> Tree:
        """Waits for a collective operation. ConnectionError if it fails and the watch knows of no rank that died."""
        try:
            mx.eval(arrays)
        except RuntimeError as error:
            if self.watch:
                self.watch.await_verdict()
            raise ConnectionError(f"{self.name}: MLX lost the connection to another rank: {error}") from None
        return arrays


def join_group(prog: str = "mlxgpt.train") -> Group:
    """Joins the group that mlx.launch or MPI's launcher started this process in; without one, a group of one.

    `prog` begins the line on stderr that reports a rank's death or error. ConnectionError when the other ranks can't be
    reached.
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
    """MLX's backend for the launcher that has set these environment variables; None if there was no launcher.

    (MLX can look for a backend itself, but where all fail each rank silently becomes a group of one.)
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


def rank_windows(batch_size: int, gradient_accumulation_steps: int, rank: int, size: int) -> list[range]:
    """A rank's share of one optimizer step, whose windows are numbered from 0 to
    batch_size * gradient_accumulation_steps - 1: a range of numbers for each of the rank's micro-batches.

    Each rank takes every size-th micro-batch if their number is a multiple of the size; else an equal part of each
    micro-batch. So the mean of the ranks' mean losses is the mean over all windows. ValueError if neither is possible.
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
