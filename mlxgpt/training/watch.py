"""Who of several processes is alive: none waits for ever in MLX for one that has died.

MLX's backends hang or fail without a name when a peer goes, each in its own way. This watch depends on none of
them: every rank keeps a connection to rank 0, over which it sends a beat, says goodbye, or says what went wrong. A
connection that ends without a word is a death.
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

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one that are a death: far above any stretch in which Python threads can't run
START = 120.0  # seconds for all ranks to start: one may be a machine that first has to read Python from a slow disk
MEETING = 20.0  # seconds for all ranks to connect, right after MLX has connected them
VERDICT = 5.0  # seconds that an error of MLX's waits for the watch to name the rank behind it
FAREWELL = 10.0  # seconds that on_death may take


class Watch:
    """The connections of one rank, and the thread that listens to them.

    When a rank has died, every other prints its name and ends with status 1; when one has failed, rank 0 prints its
    message. `on_death`, if set, is called before, and given FAREWELL seconds.
    """

    def __init__(self, rank: int, names: Sequence[str], peers: dict[int, socket.socket], prog: str) -> None:
        """`peers` are rank 0's connections to all others, or another's to rank 0."""
        self.rank, self.names, self._peers, self._prog = rank, names, peers, prog
        self.on_death: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._main_ends = threading.Event()  # the process ends by its main thread's doing,
        self._watch_ends = threading.Event()  # or by the watch's: the first one has it
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye, so that the end of this process is no death."""
        self._end_by_main({"bye": self.rank})

    def fail(self, message: str) -> None:
        """Says that this rank ends by an error. Returns on rank 0 at once, on others when rank 0 has ended, or soon:
        mlx.launch kills all when one has ended, and must not do it before rank 0 has shown the message."""
        self._end_by_main({"failed": self.rank, "message": message}, wait=self.rank > 0)

    def await_verdict(self) -> None:
        """To be called after an error in MLX's communication: does not return if the watch finds a death."""
        if self._watch_ends.wait(VERDICT):
            threading.Event().wait()  # the watch ends the process

    def _end_by_main(self, news: dict[str, Any], wait: bool = True) -> None:
        if not self._claim(self._main_ends):
            threading.Event().wait()
        self._tell(news)
        if wait:
            self._thread.join(VERDICT)  # which ends when the others have closed their ends

    def _claim(self, who: threading.Event) -> bool:
        """Whether the end of the process falls to the caller."""
        with self._lock:
            if not (self._main_ends.is_set() or self._watch_ends.is_set()):
                who.set()
            return who.is_set()

    def _tell(self, news: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            try:
                peer.sendall(json.dumps(news).encode() + b"\n")
            except OSError:
                pass  # the listening side finds out why

    def _listen(self) -> None:
        rests = dict.fromkeys(self._peers, b"")  # of lines that have not ended
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
                    *lines, rests[rank] = (rests[rank] + received).split(b"\n")
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
                    self._tell({})
                    last_beat = now

    def _read(self, sender: int, news: dict[str, Any]) -> bool:
        """Takes in a message -> whether its sender has left."""
        if "died" in news:
            self._died(news["died"])
        elif "failed" in news:
            # What fails on one rank often fails on all: then rank 0's own message is the one to show.
            if self.rank == 0 and not self._main_ends.wait(BEAT):
                self._end(f"{self.names[sender]}: {news['message']}", news)
            elif self.rank:
                self._end("", news)
                return False  # rank 0 leaves when it has shown the message
        return "bye" in news or "failed" in news

    def _died(self, rank: int) -> None:
        advice = "go on from the last checkpoint with --resume"
        # on a line of its own, whatever MLX has begun to say of lost connections
        self._end(f"{self.names[rank]} has died; {advice}", {"died": rank}, before="\n")

    def _end(self, message: str, news: dict[str, Any], before: str = "") -> None:
        """Ends the process, whose main thread may hang in MLX, unless that one is about to."""
        if not self._claim(self._watch_ends):
            return
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the rest of it, and what the main thread makes of it
        if message:
            os.write(stderr, f"{before}{self._prog}: error: {message}\n".encode())
        if self.rank == 0:
            self._tell(news)
        if self.on_death:
            farewell = threading.Thread(target=self.on_death, daemon=True)
            farewell.start()
            farewell.join(FAREWELL)
        if not message:
            self._await_end_of_rank_0()
        os._exit(1)

    def _await_end_of_rank_0(self) -> None:
        self._peers[0].settimeout(VERDICT)
        try:
            while self._peers[0].recv(65536):
                pass
        except OSError:
            pass


# Runs beside a rank that MLX connects: stdin ends when that is done, or when the rank is.
_GUARD = """
import os, select, signal, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextmanager
def guarded(message: str) -> Iterator[None]:
    """Ends this process after START seconds, with a message on stderr, unless it has left the block by then.

    MLX waits for the other ranks with Python's lock held, so that no thread of this process could do it.
    """
    arguments = [str(os.getpid()), str(START), message]
    guard = subprocess.Popen([sys.executable, "-I", "-S", "-c", _GUARD, *arguments], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        guard.communicate()


def meet(rank: int, names: Sequence[str], gather: Callable[[bytes], list[bytes]], prog: str) -> Watch:
    """Connects all ranks to rank 0. `gather` gives every rank what each of them gave.

    ConnectionError, on every rank, naming one that could not.
    """
    offer: dict[str, Any] = {}
    if rank == 0:
        server = socket.create_server(("", 0), backlog=len(names))
        token = secrets.token_hex(16)  # of this run: nobody else may report a death
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
    for name, theirs in zip(names, gather(problem.encode()), strict=True):
        if theirs:
            raise ConnectionError(f"{name}: {theirs.decode()}")
    return Watch(rank, names, peers, prog)


def _addresses() -> list[str]:
    """Where this machine may be reached: MLX's own address of rank 0, then all that it knows of itself."""
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
            probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the address that leads out of here
            hosts.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys([*hosts, name, "127.0.0.1"]))


def _proof(token: str, what: str) -> str:
    return hmac.new(token.encode(), what.encode(), "sha256").hexdigest()


def _accept(server: socket.socket, n: int, token: str) -> dict[int, socket.socket]:
    """Connections of n ranks that prove to know the token."""
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
        except (OSError, ValueError):  # a stranger
            peer.close()
    return peers


def _connect(offer: dict[str, Any], rank: int) -> socket.socket:
    """A connection to rank 0, at the first of its addresses where it proves to be that."""
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
