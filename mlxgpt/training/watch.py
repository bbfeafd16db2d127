"""Watches which ranks are alive, so that none waits forever in MLX for one that has died.

When a rank dies, MLX's backends hang, or fail without naming it, each in its own way. The watch does not depend on
them: every rank keeps a TCP connection to rank 0, over which it sends a heartbeat, says goodbye, or reports an error. A
connection that ends without one of the last two means that the rank has died.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without a heartbeat after which a rank is dead: Python threads never stand still for so long
START = 120.0  # seconds for all ranks to start: one machine may first have to read Python from a slow disk
MEETING = 20.0  # seconds for all ranks to connect to rank 0, after MLX has connected them
VERDICT = 5.0  # seconds that an error in MLX's communication waits for the watch to name the rank that caused it
FAREWELL = 10.0  # seconds that on_death may take


class Watch:
    """The connections of one rank, and the thread that listens to them.

    When a rank has died, every other rank prints its name and exits with status 1. When a rank has failed, rank 0
    prints its message, and all exit. `on_death`, if set, is called first, and has FAREWELL seconds.
    """

    def __init__(self, rank: int, names: Sequence[str], peers: dict[int, socket.socket], prog: str) -> None:
        """`peers` are the connections by rank: from rank 0 to all others, from another rank to rank 0."""
        self.rank, self.names, self._peers, self._prog = rank, names, peers, prog
        self.on_death: Callable[[], None] | None = None
        self._lock = threading.Lock()
        # The main thread and the watch may both want to end the process: whichever is set first decides the exit.
        self._main_ends = threading.Event()
        self._watch_ends = threading.Event()
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye, so that the others don't take the end of this process for a death."""
        self._end_by_main({"bye": self.rank})

    def fail(self, message: str) -> None:
        """Reports that this rank ends by an error. Returns at once on rank 0; on others when rank 0 has ended, or after
        VERDICT seconds: mlx.launch kills all ranks when one ends, and rank 0 must print the message before that."""
        self._end_by_main({"failed": self.rank, "message": message}, wait=self.rank > 0)

    def await_verdict(self) -> None:
        """To be called after an error in MLX's communication: does not return if the watch finds that a rank has died
        or failed."""
        if self._watch_ends.wait(VERDICT):
            _wait_for_exit()

    def _end_by_main(self, message: dict[str, Any], wait: bool = True) -> None:
        """Sends the main thread's last message; does not return if the watch is ending the process already."""
        if not self._set_first(self._main_ends):
            _wait_for_exit()
        self._send(message)
        if wait:
            self._thread.join(VERDICT)  # the thread ends when the others have closed their connections

    def _set_first(self, event: threading.Event) -> bool:
        """Sets one of the two events unless the other is set -> whether it is set now."""
        with self._lock:
            if not (self._main_ends.is_set() or self._watch_ends.is_set()):
                event.set()
            return event.is_set()

    def _send(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            try:
                peer.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass  # _listen finds out why

    def _listen(self) -> None:
        """The thread's work until all connections are closed: reads messages, sends heartbeats, notices silence."""
        unfinished = dict.fromkeys(self._peers, b"")  # the beginning of a line whose end has not arrived
        last_beat = 0.0
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self._peers:
                for key, _ in selector.select(BEAT):
                    rank = key.data
                    try:
                        received = self._peers[rank].recv(65536)
                    except OSError:
                        received = b""
                    *lines, unfinished[rank] = (unfinished[rank] + received).split(b"\n")
                    self._heard[rank] = time.monotonic()
                    left = any([self._read(rank, json.loads(line)) for line in lines])
                    if left or not received:
                        selector.unregister(self._peers[rank])
                        self._peers.pop(rank).close()
                        if not left:
                            self._died(rank)
                now = time.monotonic()
                for rank in self._peers:
                    if now - self._heard[rank] > SILENCE:
                        self._died(rank)
                if now - last_beat >= BEAT:
                    self._send({})
                    last_beat = now

    def _read(self, sender: int, message: dict[str, Any]) -> bool:
        """Acts on a message -> whether its sender has left."""
        if "died" in message:
            self._died(message["died"])
        elif "failed" in message:
            # An error on one rank is often one on all: then rank 0 shows its own message.
            if self.rank == 0 and not self._main_ends.wait(BEAT):
                self._end_by_watch(f"{self.names[sender]}: {message['message']}", message)
            elif self.rank:
                self._end_by_watch("", message)
                return False  # rank 0 leaves when it has shown the message
        return "bye" in message or "failed" in message

    def _died(self, rank: int) -> None:
        advice = "go on from the last checkpoint with --resume"
        # on a new line, as MLX may have begun one about lost connections
        self._end_by_watch(f"{self.names[rank]} has died; {advice}", {"died": rank}, before="\n")

    def _end_by_watch(self, text: str, message: dict[str, Any], before: str = "") -> None:
        """Ends the process, whose main thread may hang in MLX, unless the main thread is ending it already.

        Prints the text, if there is one; rank 0 passes the message on to the others.
        """
        if not self._set_first(self._watch_ends):
            return
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # drops what MLX and the main thread say of the same error
        if text:
            os.write(stderr, f"{before}{self._prog}: error: {text}\n".encode())
        if self.rank == 0:
            self._send(message)
        if self.on_death:
            farewell = threading.Thread(target=self.on_death, daemon=True)
            farewell.start()
            farewell.join(FAREWELL)
        if not text:
            self._wait_for_end_of_rank_0()
        os._exit(1)

    def _wait_for_end_of_rank_0(self) -> None:
        self._peers[0].settimeout(VERDICT)
        try:
            while self._peers[0].recv(65536):
                pass
        except OSError:
            pass


def _wait_for_exit() -> None:
    """Never returns: the watch's thread ends the process."""
    threading.Event().wait()


# A process that runs while MLX connects a rank. Its stdin is closed when MLX has, or when the rank has ended.
_GUARD = """
import os, select, signal, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextmanager
def guarded(message: str) -> Iterator[None]:
    """Ends this process, with a message on stderr, if it is still in the block after START seconds.

    MLX holds Python's global lock while it waits for the other ranks, so that a thread of this process could not do it.
    """
    arguments = [str(os.getpid()), str(START), message]
    guard = subprocess.Popen([sys.executable, "-I", "-S", "-c", _GUARD, *arguments], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        guard.communicate()


def meet(rank: int, names: Sequence[str], gather: Callable[[bytes], list[bytes]], prog: str) -> Watch:
    """Connects all ranks to rank 0. `gather` is that of the group.

    ConnectionError, on every rank, names one that could not connect.
    """
    offer: dict[str, Any] = {}
    if rank == 0:
        server = socket.create_server(("", 0), backlog=len(names))
        token = secrets.token_hex(16)  # only processes of this run know it: nobody else may report a death
        offer = {"port": server.getsockname()[1], "hosts": _addresses(), "token": token}
    offer = json.loads(gather(json.dumps(offer).encode())[0])
    peers, problem = {}, ""
    try:
        if rank == 0:
            with server:
                peers = _accept(server, len(names) - 1, offer["token"])
        else:
            peers = {0: _connect(offer, rank)}
    except OSError as error:
        problem = str(error)
    for name, text in zip(names, gather(problem.encode()), strict=True):
        if text:
            raise ConnectionError(f"{name}: {text.decode()}")
    return Watch(rank, names, peers, prog)


def _addresses() -> list[str]:
    """Addresses that may reach this machine: the one that MLX uses for rank 0, then all that the machine knows."""
    hosts = []
    if path := os.environ.get("MLX_HOSTFILE"):
        with open(path, encoding="utf-8") as file:
            hosts += [address.rsplit(":", 1)[0] for address in json.load(file)[0]]
    for variable in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        hosts += [os.environ[variable].split(":")[0]] if variable in os.environ else []
    name = socket.gethostname()
    try:
        hosts += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses this machine's address on its route out
            hosts.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys([*hosts, name, "127.0.0.1"]))


def _proof(token: str, claim: str) -> str:
    """Shows that who claims something knows the token, without sending it."""
    return hmac.new(token.encode(), claim.encode(), "sha256").hexdigest()


def _accept(server: socket.socket, n: int, token: str) -> dict[int, socket.socket]:
    """Accepts connections from n ranks, which prove that they know the token. ConnectionError if they are too late."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + MEETING
    while len(peers) < n:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = server.accept()
        except TimeoutError:
            raise ConnectionError(f"{n - len(peers)} of {n} ranks did not connect in {MEETING:.0f} s") from None
        peer.settimeout(BEAT)
        try:
            rank, _, proof = peer.recv(200).decode().strip().partition(" ")
            if not hmac.compare_digest(proof, _proof(token, f"rank {rank}")):
                raise ValueError(proof)
            peer.sendall(_proof(token, f"rank 0 to {rank}").encode())
            peers[int(rank)] = peer
        except (OSError, ValueError):  # not a rank of this run
            peer.close()
    return peers


def _connect(offer: dict[str, Any], rank: int) -> socket.socket:
    """A connection to rank 0, at the first of its addresses where it proves that it knows the token."""
    deadline = time.monotonic() + MEETING - 2 * BEAT  # before rank 0 gives up
    while time.monotonic() < deadline:
        for host in offer["hosts"]:
            try:
                peer = socket.create_connection((host, offer["port"]), timeout=2 * BEAT)
            except OSError:
                continue
            try:
                peer.sendall(f"{rank} {_proof(offer['token'], f'rank {rank}')}\n".encode())
                if hmac.compare_digest(peer.recv(200).decode(), _proof(offer["token"], f"rank 0 to {rank}")):
                    peer.settimeout(BEAT)
                    return peer
            except (OSError, ValueError):
                pass
            peer.close()
        time.sleep(0.1)
    raise ConnectionError(f"can't reach rank 0 at {', '.join(offer['hosts'])}, port {offer['port']}; is it a firewall?")
