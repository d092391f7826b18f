"""Notices that this machine will be taken away: a file that appears, or what the metadata service of a cloud says.

Sources: the instance metadata services of
`AWS <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html>`_ (two minutes before),
`Google Cloud <https://cloud.google.com/compute/docs/instances/spot>`_ and
`Azure <https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events>`_ (30 seconds before). Kubernetes and SLURM
send SIGTERM instead.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_gpuorch.errors import ConfigurationError

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
_ANSWER_SECONDS = 2.0
_MAX_BYTES = 65_536
_LINK_LOCAL = "http://169.254.169.254"

Source = Callable[[], "str | None"]
"""Tells why the machine will be taken away, or None. Raises ``OSError`` or ``ValueError`` where it cannot tell."""


def notice_source(setting: str) -> Source:
    """Where notices come from.

    Args:
        setting: ``aws``, ``gcp`` or ``azure``, each also with ``@`` and the address of the metadata service; or the path of
            a file.

    Raises:
        ConfigurationError: It is neither.
    """
    cloud, _, address = setting.partition("@")
    if cloud in _CLOUDS:
        default, ask = _CLOUDS[cloud]
        service = MetadataService(address or default)
        return lambda: ask(service)
    path = Path(setting).expanduser()
    if not path.is_absolute() or "@" in setting:
        raise ConfigurationError(
            f"preemption_notice={setting!r} is neither {', '.join(_CLOUDS)} nor the absolute path of a file."
        )
    return lambda: f"{path} is there" if path.exists() else None


class PreemptionWatch:
    """Asks again and again, in a thread, until there is a notice.

    Args:
        source: Tells why the machine will be taken away.
        on_notice: Called once with the reason, in that thread.
        poll_seconds: Time between two questions.
    """

    def __init__(self, source: Source, on_notice: Callable[[str], None], poll_seconds: float = POLL_SECONDS):
        self._source, self._on_notice, self._poll_seconds = source, on_notice, poll_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpuorch-preemption", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._stop.set()
        self._thread.join(2 * _ANSWER_SECONDS)

    def _watch(self) -> None:
        told = False
        while not self._stop.is_set():
            try:
                reason = self._source()
            except (OSError, ValueError) as error:
                if not told:
                    log.warning("nobody tells whether this machine will be taken away: %s; it is asked again", error)
                told, reason = True, None
            if reason is not None:
                self._on_notice(reason)
                return
            self._stop.wait(self._poll_seconds)


class MetadataService:
    """The metadata service of a virtual machine.

    Args:
        address: Its URL.
    """

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's alone
        self.known: dict[str, str] = {}
        """What need not be asked twice."""

    def ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str | None:
        """The text at a path; None if there is none.

        Raises:
            OSError: The service cannot be reached, or refuses.
        """
        request = urllib.request.Request(self._address + path, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return answer.read(_MAX_BYTES).decode()  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                if error.code == 401:
                    self.known.clear()
                raise


def _aws(service: MetadataService) -> str | None:
    if "token" not in service.known:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        service.known["token"] = service.ask("/latest/api/token", lifetime, "PUT") or ""
    token = {"X-aws-ec2-metadata-token": service.known["token"]}
    action = service.ask("/latest/meta-data/spot/instance-action", token)
    if action is None:
        return None
    said = _object(action)
    return f"AWS will {said.get('action', 'stop')} this instance at {said.get('time', 'a time it does not tell')}"


def _gcp(service: MetadataService) -> str | None:
    said = service.ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "Google Cloud takes this instance away" if said is not None and said.strip() == "TRUE" else None


def _azure(service: MetadataService) -> str | None:
    headers = {"Metadata": "true"}
    if "name" not in service.known:
        name = service.ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
        service.known["name"] = (name or "").strip()
    for event in _object(service.ask("/metadata/scheduledevents?api-version=2020-07-01", headers) or "{}").get(
        "Events", ()
    ):
        if event.get("EventType") in ("Preempt", "Terminate") and service.known["name"] in event.get("Resources", ()):
            return f"Azure: {event['EventType']} of this machine, not before {event.get('NotBefore') or 'now'}"
    return None


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"the metadata service has said {text[:80]!r}")  # noqa: TRY004 - as for text that is no JSON
    return value


_CLOUDS: dict[str, tuple[str, Callable[[MetadataService], str | None]]] = {
    "aws": (_LINK_LOCAL, _aws),
    "gcp": ("http://metadata.google.internal", _gcp),
    "azure": (_LINK_LOCAL, _azure),
}
"""Address of the metadata service, and how it is asked."""
