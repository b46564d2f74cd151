"""Nobody waits for a rank that is gone: one that dies, falls silent or fails alone ends the others,
which name it.

Rank 0 asks every rank, itself included, every few seconds whether it is there. Questions and
answers have connections and threads of their own, so that hours of tokenising are no silence; nor,
though, is a main thread that hangs: that is for the process group's own timeout. A process that
dies closes its connection and is missed at once; one that is stopped, or whose host has lost its
power, when it has not answered for the timeout. Each side counts by its own monotonic clock.

torch's store would not do: a client of a `TCPStore` whose host is stopped stays in `get` for ever,
whatever its timeout.

All that is said are lines. A rank says who it is, by a token that is known to this run alone; then
an empty line, an answer, for every question; at last LEFT, or FAILED and why, or MISSED: rank 0.
Rank 0 says empty lines, questions; at last LEAVE, or what to end with.
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
INTERVAL_S = 5.0  # between questions; a tenth of the timeout at most
# From the first rank that died or failed to the verdict: a dead rank brings others down, which may
# be heard of first, and an error that is everybody's does not reach all at the same moment.
GRACE_S = 3.0


@contextlib.contextmanager
def guard(group: Any, timeout_s: float, advice: str) -> Iterator[None]:
    """Inside, a rank that is missed ends every other process with status 1 and a line on stderr.

    The ranks enter and leave together. Where all of them fail, as with a setting that is wrong,
    each leaves with its own error; where some do, these leave with theirs and the others are ended.

    Args:
        group: a process group for objects on the CPU, in which the ranks introduce themselves.
        timeout_s: a rank is missed when it has not answered for so many seconds.
        advice: the end of the line: what to do now.
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
    # Rank 0 runs on this host, or the ranks would not have found each other.
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
    """On every address: by which of them the other hosts come is not known here."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _say(connection: socket.socket, line: bytes = b"") -> None:
    """Short, so it goes out in one piece, whichever thread says it. That nobody is there to hear it
    is found in reading."""
    with contextlib.suppress(OSError):
        connection.sendall(line + b"\n")


class _Member(threading.Thread):
    """Any rank's side: answers, and ends the process when told to or when rank 0 is missed."""

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
        """Say so, and wait until everybody does. In the main thread."""
        _say(self.connection, word)
        # With this a launcher that saw a rank die ends the others; they are to name it first.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.join()
        signal.signal(signal.SIGTERM, before)


def _last_line(what: str, advice: str) -> bytes:
    return f"distilfast: {what}; the run stops; {advice}".encode()


def _silence(names: str, timeout_s: float) -> str:
    return f"nothing was heard of {names} for {timeout_s:g} s"


def _end(line: bytes) -> None:
    """From a thread, whatever the main one waits for. There is nothing to put in order: a
    checkpoint appears when it is complete, and what the metrics are ahead of it is cut off."""
    os.write(2, line + b"\n")
    os._exit(1)


@dataclass
class _Caller:
    """A connection to rank 0; of no rank before the token has come."""

    connection: socket.socket
    rank: int | None = None
    unread: bytes = b""


class _Host(threading.Thread):
    """Rank 0's side: asks, and finds the verdict, so that it is the same on all ranks."""

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
        # Since when a rank owes an answer. Not when it was last heard of: if this process was
        # stopped for a while, nobody was asked.
        self.owing = dict.fromkeys(range(len(names)), time.monotonic())
        self.left: set[int] = set()
        self.died: set[int] = set()
        self.failed: dict[int, str] = {}  # the reason; the first to fail is the first
        self.since = math.inf  # when the first died or failed

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
                with contextlib.suppress(OSError):  # it hung up before it was taken
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
                said = b""  # a stranger
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
        elif line == MISSED:  # this process was stopped, and the others have ended
            _end(_last_line(_silence(self.names[0], self.timeout_s), self.advice))

    def _parted(self) -> bool:
        """Whether there was a last word to say."""
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
                # And those that fell silent with it, but had been asked a little later.
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
        """The last word to each: rank 0 when the others have hung up, as what has not reached them
        may be lost with its process."""
        words = {rank: LEAVE if rank in leaving else line for rank in self.callers}
        first = words.pop(0, None)
        for rank, word in words.items():
            _say(self.callers[rank].connection, word)
        until = time.monotonic() + GRACE_S
        while self.callers.keys() - {0, *silent} and time.monotonic() < until:
            self._hear(0.1)
        if first is not None and 0 in self.callers:
            _say(self.callers[0].connection, first)
