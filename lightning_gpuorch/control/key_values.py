"""Values that ranks share through the coordinator: published under a key, or compared."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from lightning_gpuorch.control.input_ledger import REMEDY
from lightning_gpuorch.control.messages.ranks import Agree, Lookup, Publish, Published
from lightning_gpuorch.control.pending import answered, pending, resolve
from lightning_gpuorch.errors import InputMismatchError


class KeyValueStore:
    """Small values, for the life of the run."""

    def __init__(self) -> None:
        self._published: dict[str, Published] = {}
        self._agreed: dict[str, tuple[str, int]] = {}
        self._lookups: dict[str, list[Future[Published]]] = {}
        self._lock = threading.Lock()

    @property
    def routes(self) -> Mapping[type, Any]:
        """What is answered here."""
        return {Publish: self.publish, Lookup: self.lookup, Agree: self.agree}

    def publish(self, request: Publish) -> None:
        """Store a value and tell those who wait for it."""
        with self._lock:
            value = self._published[request.key] = Published(value=request.value)
            resolve(self._lookups.pop(request.key, []), value)

    def lookup(self, request: Lookup) -> Future[Published]:
        """The value of a key, as soon as there is one."""
        with self._lock:
            if request.key in self._published:
                return answered(self._published[request.key])
            waiter = pending()
            self._lookups.setdefault(request.key, []).append(waiter)
            return waiter

    def agree(self, request: Agree) -> None:
        """Compare a value with the first one of its key.

        Raises:
            InputMismatchError: They differ; both ranks are named.
        """
        with self._lock:
            value, rank = self._agreed.setdefault(request.key, (request.value, request.sender.rank))
        if value != request.value:
            raise InputMismatchError(
                f"{request.what} of a dataloader differs between rank {rank} and rank {request.sender.rank}. {REMEDY}"
            )
