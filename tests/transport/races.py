"""Streams that forget nothing: finds work on two of them that touches the same memory unordered.

Operations are run at once, on a CPU; only who may run before whom is kept, as vector clocks of
streams and of host threads. A cache is watched block by block, any other tensor as a whole.
"""

from collections import defaultdict
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST = "host"


class Event:
    def __init__(self, streams: "Streams") -> None:
        self._streams, self.clock = streams, {}

    def record(self, stream: str) -> None:
        self.clock = dict(self._streams.clocks[stream])

    def synchronize(self) -> None:
        self._streams.learn(self._streams.thread, self.clock)


class Stream(str):
    def __new__(cls, streams: "Streams", name: str) -> "Stream":
        made = super().__new__(cls, name)
        made.streams = streams
        return made

    def wait_event(self, event: Event) -> None:
        self.streams.learn(self, event.clock)


class Streams(TorchDispatchMode):
    """In the place of `torch.cuda`, for one test thread that plays all threads."""

    def __init__(self, cache: torch.Tensor) -> None:
        super().__init__()
        self._cache = cache.untyped_storage().data_ptr()
        self.thread, self._count = "steps", 0
        self.current = {"steps": Stream(self, "compute")}
        self.clocks: dict[str, dict[str, int]] = defaultdict(dict)
        self._wrote: dict = {}  # what -> (who, when)
        self._read: dict = defaultdict(list)
        self._alive: list = []  # addresses are not used again

    # torch.cuda

    def Event(self, blocking: bool) -> Event:
        assert blocking, "waiting threads leave the processor to others"
        return Event(self)

    def Stream(self, device: torch.device) -> Stream:
        self._count += 1
        return Stream(self, f"stream {self._count}")

    def current_stream(self, device: torch.device) -> Stream:
        return self.current[self.thread]

    @contextmanager
    def stream(self, stream: Stream):
        before = self.current.get(self.thread)
        self.current[self.thread] = stream
        yield
        self.current[self.thread] = before

    # The test's

    @contextmanager
    def in_thread(self, name: str):
        """Be another host thread, started here; what it learns, others do not."""
        before, self.thread = self.thread, name
        self.learn(name, self.clocks[before])
        yield
        self.thread = before

    def joined(self, name: str) -> None:
        """This thread hears that another is done."""
        self.learn(self.thread, self.clocks[name])

    def learn(self, who: str, clock: dict[str, int]) -> None:
        mine = self.clocks[who]
        for other, when in clock.items():
            mine[other] = max(mine.get(other, 0), when)

    def touch(self, reads: list, writes: list) -> None:
        """Now, by this thread's current stream, or by the thread itself without one."""
        who = self.current.get(self.thread) or f"{HOST} {self.thread}"
        self.learn(who, self.clocks[self.thread])
        mine = self.clocks[who]
        mine[who] = mine.get(who, 0) + 1
        for what in reads + writes:
            self._after(mine, self._wrote.get(what), what)
        for what in writes:
            for access in self._read.pop(what, ()):
                self._after(mine, access, what)
            self._wrote[what] = who, mine[who]
        for what in reads:
            self._read[what].append((who, mine[who]))
        if who.startswith(HOST):
            self.learn(self.thread, mine)

    def _after(self, clock: dict[str, int], access, what) -> None:
        if access is not None:
            who, when = access
            assert clock.get(who, 0) >= when, f"{what}: not ordered behind {who}"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._alive += [leaf for leaf in tree_leaves((args, out)) if torch.is_tensor(leaf)]
        schema = function._schema
        if function.is_view or "empty" in schema.name:
            return out
        reads, writes = [], []
        given = list(zip(schema.arguments, args, strict=False))
        for argument, value in given:
            for tensor in tree_leaves(value):
                if torch.is_tensor(tensor):
                    written = argument.alias_info is not None and argument.alias_info.is_write
                    (writes if written else reads).extend(self._whole(tensor, function, args))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and not any(tensor is one for _, one in given):
                writes.extend(self._whole(tensor, function, args))
        self.touch(reads, writes)
        return out

    def _whole(self, tensor: torch.Tensor, function, args) -> list:
        address = tensor.untyped_storage().data_ptr()
        if address != self._cache:
            return [address]
        assert function in (aten.index.Tensor, aten.index_put_.default), f"{function} on the cache"
        return [("block", block) for block in args[1][0].tolist()]
