"""What a simulated job runs on: a virtual clock, processes, a network and an object store, all drawn from one seed.

Everything happens on one thread, in events; an event that waits for the store moves the clock on for itself alone, so what it
does is seen a little before its answer comes, as with a store whose answers are slow.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Protocol

from obstore import exceptions
from obstore.store import MemoryStore

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Request
from lightning_gpuorch.errors import ControlPlaneError, ControlPlaneTimeoutError, GPUOrchError, OtherJobError
from lightning_gpuorch.predictions.storage.object_store import ObjectStore

Resume = Callable[[Any, GPUOrchError | None], None]
Wait = Callable[[Resume], None]
"""What a process yields: it is handed what continues the process, with a value or an error."""
Script = Generator[Wait, Any, Any]


class VirtualTime:
    """Events in the order of their time; ``now`` is the time of the event under way, and what it has waited since."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay_seconds: float, action: Callable[[], None]) -> None:
        """Have an action happen later."""
        heapq.heappush(self._events, (self.now + delay_seconds, next(self._count), action))

    def sleep(self, delay_seconds: float) -> Wait:
        """What a process yields to wait."""
        return lambda resume: self.after(delay_seconds, lambda: resume(None, None))

    def run(self, is_over: Callable[[], bool], limit: float) -> bool:
        """Let events happen; returns whether it was over before the limit."""
        while not is_over():
            if not self._events:
                return False
            self.now, _, action = heapq.heappop(self._events)
            if self.now > limit:
                return False
            action()
        return True


class Process:
    """A process as a generator of what it waits for.

    Args:
        time: The clock.
        script: What it does.
        on_end: Called with what the script has returned, or the error that has ended it; not if the process is killed.
    """

    def __init__(self, time: VirtualTime, script: Script, on_end: Callable[[Any], None]):
        self._script, self._on_end = script, on_end
        self.alive = True
        time.after(0.0, lambda: self._resume(None, None))

    def kill(self) -> None:
        """End it where it stands."""
        if self.alive:
            self.alive = False
            self._script.close()

    def _resume(self, value: Any, error: GPUOrchError | None) -> None:
        if not self.alive:
            return
        try:
            wait = self._script.send(value) if error is None else self._script.throw(error)
        except (StopIteration, GPUOrchError) as end:
            self.alive = False
            self._on_end(end.value if isinstance(end, StopIteration) else end)
        else:
            wait(self._resume)


class SimulatedStore(ObjectStore):
    """The product's object store over a memory, whose answers are slow, fail, or get lost after the store has done its work.

    Args:
        root: Its root.
        time: The clock.
        rng: Draws delays and failures.
    """

    def __init__(self, root: str, time: VirtualTime, rng: random.Random):
        super().__init__(MemoryStore(), root, lambda: time.now, self._wait)
        self._time, self._rng, self._thread = time, rng, threading.get_ident()
        self.down_until = self.slow_until = 0.0
        self.failing = self.losing = 0.0
        """Shares of requests that fail, and whose answers get lost."""

    def _wait(self, seconds: float) -> None:
        self._time.now += seconds * self._rng.uniform(0.5, 1.0)

    def _guarded(self, request: Callable[[], Any]) -> Any:
        if threading.get_ident() != self._thread:  # of a pool: in no order that the seed could tell
            return super()._guarded(request)
        self._time.now += self._rng.uniform(0.001, 0.02) * (100 if self._time.now < self.slow_until else 1)
        if self._time.now < self.down_until or self._rng.random() < self.failing:
            raise exceptions.GenericError("status code: 503")
        answer = super()._guarded(request)
        if self._rng.random() < self.losing:
            raise exceptions.GenericError("the connection was closed before the answer")
        return answer


class Observer(Protocol):
    """Sees what the coordinator does."""

    def attach(self, coordinator: Coordinator, run_id: str) -> None:
        """A coordinator begins."""
        ...

    def handled(self, request: Request[Any], answer: Any) -> None:
        """A request is answered, or refused with an error."""
        ...


class Host:
    """Where the coordinator runs: it takes one request after the other, and may be killed and started again."""

    def __init__(self, time: VirtualTime, observer: Observer):
        self.coordinator: Coordinator | None = None
        self.run_id = ""
        self._time, self._observer = time, observer
        self._busy_until = 0.0
        self._in_flight: set[_Call] = set()

    def start(self, coordinator: Coordinator, run_id: str) -> None:
        """A coordinator begins."""
        self.coordinator, self.run_id = coordinator, run_id
        self._observer.attach(coordinator, run_id)

    def stop(self) -> None:
        """It is gone, and all connections with it."""
        self.coordinator = None
        for call in sorted(self._in_flight, key=lambda call: call.number):
            call.lose()
        self._in_flight.clear()

    def turn(self, action: Callable[[], None]) -> None:
        """Do something when the coordinator has time."""
        if self._time.now < self._busy_until:
            self._time.after(self._busy_until - self._time.now, lambda: self.turn(action))
        else:
            action()
            self._busy_until = self._time.now

    def receive(self, call: _Call) -> None:
        """A request has arrived."""
        self._in_flight.add(call)
        self.turn(lambda: self._handle(call))

    def forget(self, call: _Call) -> None:
        """A request is over."""
        self._in_flight.discard(call)

    def _handle(self, call: _Call) -> None:
        if self.coordinator is None:
            call.lose()
        elif call.job not in ("", self.run_id):
            call.reply(OtherJobError(f"the coordinator belongs to {self.run_id}, not to {call.job}"))
        else:
            self.coordinator.handle(call.request).add_done_callback(lambda future: self._answer(call, future))

    def _answer(self, call: _Call, future: Future[Any]) -> None:
        error = future.exception()
        answer = future.result() if error is None else error
        self._observer.handled(call.request, answer)
        call.reply(answer)


class Network:
    """Between nodes and the coordinator; on the coordinator's own node nothing is lost.

    Attributes:
        losing, doubling, slow: Shares of messages that get lost, arrive twice, or are late by seconds.
        cut_until: When the cut of a machine ends; machine 0 is the coordinator's.
    """

    def __init__(self, time: VirtualTime, rng: random.Random, host: Host):
        self.time, self.rng, self.host = time, rng, host
        self.losing = self.doubling = self.slow = 0.0
        self.cut_until: dict[int, float] = {}
        self.num_calls = 0

    def call(
        self, machine: int, request: Request[Any], timeout_seconds: float, patience_seconds: float, job: str = ""
    ) -> Wait:
        """What a process yields to ask the coordinator; see :class:`RemoteChannel`, in whose place this stands."""
        return lambda resume: _Call(self, machine, request, timeout_seconds, patience_seconds, job, resume).send()

    def reaches(self, machine: int) -> bool:
        """Whether messages travel now."""
        return self.host.coordinator is not None and self.time.now >= self.cut_until.get(machine, 0.0)

    def is_lost(self, machine: int) -> bool:
        """Whether a message gets lost."""
        return machine != 0 and self.rng.random() < self.losing

    def delay(self, machine: int) -> float:
        """How long a message travels, in seconds."""
        if machine == 0:
            return 0.0002
        return self.rng.uniform(1.0, 20.0) if self.rng.random() < self.slow else self.rng.uniform(0.0005, 0.005)


class _Call:
    """A request under way, sent again until it is answered."""

    def __init__(
        self,
        network: Network,
        machine: int,
        request: Request[Any],
        timeout_seconds: float,
        patience_seconds: float,
        job: str,
        resume: Resume,
    ):
        self._network, self._machine, self.request, self.job, self._resume = network, machine, request, job, resume
        self._timeout_seconds, self._patience_seconds = timeout_seconds, patience_seconds
        network.num_calls += 1
        self.number = network.num_calls
        self._done = False
        self._lost_since: float | None = None
        self._deadline = network.time.now + timeout_seconds
        network.time.after(timeout_seconds, self._check_deadline)

    def send(self) -> None:
        """Send it, perhaps again."""
        network = self._network
        if self._done:
            return
        if not network.reaches(self._machine):
            self._unreachable()
            return
        for _ in range(2 if network.rng.random() < network.doubling else 1):
            if network.is_lost(self._machine):
                self.lose()
            else:
                network.time.after(network.delay(self._machine), self._arrive)

    def lose(self) -> None:
        """A message of it was lost, which the connection notices after a while."""
        self._network.time.after(self._network.rng.uniform(0.05, 10.0), self._unreachable)

    def reply(self, answer: Any) -> None:
        """The coordinator has answered."""
        network = self._network
        if not network.reaches(self._machine) or network.is_lost(self._machine):
            self.lose()
        else:
            network.time.after(network.delay(self._machine), lambda: self._finish(answer))

    def _arrive(self) -> None:
        if self._network.reaches(self._machine):  # a late copy of what is answered already arrives as well
            self._lost_since = None
            self._network.host.receive(self)
        else:
            self.lose()

    def _unreachable(self) -> None:
        if self._done:
            return
        now = self._network.time.now
        self._lost_since = now if self._lost_since is None else self._lost_since
        if now - self._lost_since > self._patience_seconds:
            self._finish(ControlPlaneError(f"the coordinator cannot be reached for {now - self._lost_since:.0f} s"))
            return
        self._deadline = now + self._timeout_seconds
        self._network.time.after(self._network.rng.uniform(0.2, 1.0), self.send)

    def _check_deadline(self) -> None:
        if self._done:
            return
        left = self._deadline - self._network.time.now
        if left > 0:
            self._network.time.after(left, self._check_deadline)
        else:
            self._finish(ControlPlaneTimeoutError(f"{type(self.request).__name__} was not answered"))

    def _finish(self, answer: Any) -> None:
        if not self._done:
            self._done = True
            self._network.host.forget(self)
            if isinstance(answer, GPUOrchError):
                self._resume(None, answer)
            else:
                self._resume(answer, None)
