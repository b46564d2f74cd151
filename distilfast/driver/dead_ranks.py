"""End a run when one of its ranks is gone, so that no rank waits for it.

If a rank dies, falls silent, or fails while others go on, every other rank prints its name and
ends. Every few seconds, rank 0 asks every rank, itself included, whether it is there. Questions and
answers use their own connections and threads, so a rank that tokenises for hours still answers. A
rank whose main thread hangs also still answers: that is left to the process group's own timeout.

A process that dies closes its connection and is missed at once. A process that is stopped, or whose
host has lost power, is missed when it has not answered for the timeout. Each side uses its own
monotonic clock.

torch's store is no alternative: if the host of a `TCPStore` is stopped, a client stays in `get` for
ever, even with a timeout.

The protocol is made of lines. A rank first sends a token that identifies it and that only this run
knows. It answers each question with an empty line. Its last line is LEFT, FAILED with the reason,
or MISSED if it misses rank 0. Rank 0 sends empty lines as questions. Its last line is LEAVE, or the
message that the rank prints before it ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import selectors
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LEFT, FAILED, MISSED, LEAVE = b"left", b"failed: ", b"missed", b"leave"
INTERVAL_S = 5.0  # between questions; at most a tenth of the timeout
# The wait between the first death or failure and the verdict. A dead rank brings others down, and
# their news may arrive before its own. An error of all ranks does not reach them all at once.
GRACE_S = 3.0


@contextlib.contextmanager
def guard(group: Any, timeout_s: float, advice: str) -> Iterator[None]:
    """Inside, when a rank is missed, every other process ends with status 1 and a line on stderr.

    The ranks enter and leave together. If all of them fail, as with a wrong setting, each raises
    its own error. If only some fail, these raise their errors and the others are ended.

    Args:
        group: a process group for objects on the CPU, used to exchange names and tokens.
        timeout_s: a rank is missed when it has not answered for this many seconds.
        advice: the end of the line, which tells the user what to do.
    """
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    if ranks == 1:
        yield
        return
    listener = _listen() if rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    name = f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"
    everyone: list[Any] = [None] * ranks
    said = (name, port, secrets.token_hex(16))
    torch.distributed.all_gather_object(everyone, said, group=group)
    names, (_, port, _) = [name for name, _, _ in everyone], everyone[0]
    tokens = [token.encode() for _, _, token in everyone]
    if listener:
        _Host(listener, tokens, names, timeout_s, advice).start()
    # MASTER_ADDR is rank 0's host, as the ranks could not have connected otherwise.
    address = (os.environ["MASTER_ADDR"], port)
    member = _Member(address, tokens[rank], names[0], timeout_s, advice)
    member.start()
    try:
        yield
    except BaseException as error:
        member.leave(FAILED + textwrap.shorten(f"{type(error).__name__}: {error}", 300).encode())
        raise
    member.leave(LEFT)


def _listen() -> socket.socket:
    """Listen on every address: we do not know which one the other hosts use."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _say(connection: socket.socket, line: bytes = b"") -> None:
    """Send a line. It is short enough to be sent in one piece by any thread. If the other side is
    gone, the next read will notice, so errors are ignored."""
    with contextlib.suppress(OSError):
        connection.sendall(line + b"\n")


class _Member(threading.Thread):
    """The side of each rank: it answers, and ends the process when rank 0 says so or is missed."""

    def __init__(
        self, address: tuple[str, int], token: bytes, host: str, timeout_s: float, advice: str
    ):
        super().__init__(name="watch", daemon=True)
        self.host, self.timeout_s, self.advice = host, timeout_s, advice
        self.connection = socket.create_connection(address, timeout_s)
        _say(self.connection, token)

    def run(self) -> None:
        last = b""
        with self.connection, self.connection.makefile("rb") as lines:
            try:
                while (last := lines.readline()) == b"\n":
                    _say(self.connection)
            except TimeoutError:
                last = _last_line(_silence(self.host, self.timeout_s), self.advice)
                _say(self.connection, MISSED)
            except OSError:
                pass
        if last.strip() != LEAVE:
            _end(last.strip() or _last_line(f"{self.host} died", self.advice))

    def leave(self, word: bytes) -> None:
        """Send the last line, and wait until all ranks leave. Call it in the main thread."""
        _say(self.connection, word)
        # A launcher that saw a rank die sends SIGTERM. The others must name that rank first.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.join()
        signal.signal(signal.SIGTERM, before)


def _last_line(what: str, advice: str) -> bytes:
    return f"distilfast: {what}; the run stops; {advice}".encode()


def _silence(names: str, timeout_s: float) -> str:
    return f"nothing was heard of {names} for {timeout_s:g} s"


def _end(line: bytes) -> None:
    """Print a line and end the process from a thread, even while the main thread waits.

    No clean-up is needed: a checkpoint appears only when it is complete, and a resumed run cuts off
    the metrics after it.
    """
    os.write(2, line + b"\n")
    os._exit(1)


@dataclass
class _Caller:
    """A connection to rank 0. Its rank is None until the token has arrived."""

    connection: socket.socket
    rank: int | None = None
    unread: bytes = b""


class _Host(threading.Thread):
    """The host's side, in rank 0: it asks, and alone decides, so that all ranks end alike."""

    def __init__(
        self,
        listener: socket.socket,
        tokens: Sequence[bytes],
        names: Sequence[str],
        timeout_s: float,
        advice: str,
    ):
        super().__init__(name="watch-host", daemon=True)
        self.listener, self.tokens, self.names = listener, tokens, names
        self.timeout_s, self.advice = timeout_s, advice
        self.interval_s = min(INTERVAL_S, timeout_s / 10)
        self.selector = selectors.DefaultSelector()
        self.callers: dict[int, _Caller] = {}
        # When each rank was asked, if it has not answered yet. The time of its last answer would
        # not do: if this process was stopped for a while, it asked nobody.
        self.owing = dict.fromkeys(range(len(names)), time.monotonic())
        self.left: set[int] = set()
        self.died: set[int] = set()
        self.failed: dict[int, str] = {}  # the reasons, in the order of the failures
        self.since = math.inf  # the time of the first death or failure

    def run(self) -> None:
        asked = -math.inf
        with self.selector, self.listener:
            self.selector.register(self.listener, selectors.EVENT_READ)
            while not self._parted():
                if time.monotonic() - asked >= self.interval_s:
                    asked = time.monotonic()
                    for rank, caller in self.callers.items():
                        self.owing.setdefault(rank, asked)
                        _say(caller.connection)
                self._hear(min(1.0, self.interval_s))
            for caller in self.callers.values():
                caller.connection.close()

    def _hear(self, wait_s: float) -> None:
        for key, _ in self.selector.select(wait_s):
            if key.data:
                self._read(key.data)
            else:
                with contextlib.suppress(OSError):  # the caller hung up before it was accepted
                    connection, _ = self.listener.accept()
                    self.selector.register(connection, selectors.EVENT_READ, _Caller(connection))

    def _read(self, caller: _Caller) -> None:
        try:
            said = caller.connection.recv(4096)
        except OSError:
            said = b""
        *lines, caller.unread = (caller.unread + said).split(b"\n")
        for line in lines:
            if caller.rank is not None:
                self._note(caller.rank, line)
            elif line in self.tokens:
                caller.rank = self.tokens.index(line)
                self.callers[caller.rank] = caller
                self._note(caller.rank, b"")
            else:
                said = b""  # a stranger: close the connection
                break
        if said:
            return
        self.selector.unregister(caller.connection)
        caller.connection.close()
        if caller.rank is not None:
            del self.callers[caller.rank]
            self.owing.pop(caller.rank, None)
            if caller.rank not in self.failed:
                self.died.add(caller.rank)
                self.since = min(self.since, time.monotonic())

    def _note(self, rank: int, line: bytes) -> None:
        self.owing.pop(rank, None)
        if line == LEFT:
            self.left.add(rank)
        elif line.startswith(FAILED):
            self.failed[rank] = line.removeprefix(FAILED).decode()
            self.since = min(self.since, time.monotonic())
        elif line == MISSED:  # this process was stopped for so long that the others have ended
            _end(_last_line(_silence(self.names[0], self.timeout_s), self.advice))

    def _parted(self) -> bool:
        """Decide whether the ranks have to end or may leave; if so, tell them and return True."""
        everyone = range(len(self.names))
        if len(self.left) == len(everyone):
            self._part(b"", leaving=everyone)
            return True
        now = time.monotonic()
        silent = [r for r, since in self.owing.items() if now - since > self.timeout_s]
        running = len(everyone) - len(self.died) - len(self.failed)
        if not silent and now - self.since < GRACE_S and running:
            return False
        leaving: Collection[int] = ()
        if silent or self.died:
            what = [f"{self._named(self.died)} died"] if self.died else []
            if silent:
                # Include ranks that fell silent at the same time but were asked a little later.
                silent = [r for r, since in self.owing.items() if now - since > self.timeout_s / 2]
                what.append(_silence(self._named(silent), self.timeout_s))
        else:
            rank, reason = next(iter(self.failed.items()))
            what, leaving = [f"{self.names[rank]} failed: {reason}"], self.failed
        self._part(_last_line(", ".join(what), self.advice), leaving, silent)
        return True

    def _named(self, ranks: Iterable[int]) -> str:
        return ", ".join(self.names[rank] for rank in sorted(ranks))

    def _part(self, line: bytes, leaving: Collection[int] = (), silent: Iterable[int] = ()) -> None:
        """Send each rank its last line. Rank 0 gets its own after the others have hung up: when its
        process ends, lines that have not arrived may be lost."""
        words = {rank: LEAVE if rank in leaving else line for rank in self.callers}
        first = words.pop(0, None)
        for rank, word in words.items():
            _say(self.callers[rank].connection, word)
        until = time.monotonic() + GRACE_S
        while self.callers.keys() - {0, *silent} and time.monotonic() < until:
            self._hear(0.1)
        if first is not None and 0 in self.callers:
            _say(self.callers[0].connection, first)
