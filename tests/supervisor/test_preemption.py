"""Notices that a machine will be taken away, from metadata services that speak as those of the clouds do."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.supervisor.preemption import PreemptionWatch, notice_source


class Metadata:
    """A metadata service: what it says by method and path, and the headers it asks for."""

    def __init__(self) -> None:
        self.says: dict[str, str] = {}
        self.wants: dict[str, tuple[str, str]] = {}
        self.asked: list[str] = []
        metadata = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                key = f"{self.command} {self.path}"
                metadata.asked.append(key)
                name, value = metadata.wants.get(self.path, ("", ""))
                status = 401 if name and self.headers.get(name) != value else 200 if key in metadata.says else 404
                body = metadata.says.get(key, "").encode() if status == 200 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = _answer  # noqa: N815 - names of the standard library

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_aws_announces_a_spot_interruption_and_its_tokens_expire(metadata: Metadata) -> None:
    action = "/latest/meta-data/spot/instance-action"
    metadata.says["PUT /latest/api/token"] = "first"
    metadata.wants[action] = ("X-aws-ec2-metadata-token", "first")
    ask = notice_source(f"aws@{metadata.address}")
    assert ask() is None
    assert ask() is None
    assert metadata.asked.count("PUT /latest/api/token") == 1
    metadata.says["PUT /latest/api/token"] = "second"
    metadata.wants[action] = ("X-aws-ec2-metadata-token", "second")
    with pytest.raises(OSError, match="401"):
        ask()
    metadata.says[f"GET {action}"] = json.dumps({"action": "terminate", "time": "2026-11-29T08:22:00Z"})
    assert ask() == "AWS will terminate this instance at 2026-11-29T08:22:00Z"


def test_google_cloud_says_so_in_one_word(metadata: Metadata) -> None:
    path = "/computeMetadata/v1/instance/preempted"
    metadata.wants[path] = ("Metadata-Flavor", "Google")
    metadata.says[f"GET {path}"] = "FALSE"
    ask = notice_source(f"gcp@{metadata.address}")
    assert ask() is None
    metadata.says[f"GET {path}"] = "TRUE"
    assert ask() == "Google Cloud takes this instance away"


def test_azure_announces_events_of_this_and_of_other_machines(metadata: Metadata) -> None:
    events = "/metadata/scheduledevents?api-version=2020-07-01"
    metadata.says["GET /metadata/instance/compute/name?api-version=2021-02-01&format=text"] = "node-3\n"
    ask = notice_source(f"azure@{metadata.address}")
    assert ask() is None

    def event(kind: str, machine: str) -> dict[str, object]:
        return {"EventType": kind, "Resources": [machine], "NotBefore": "Sun, 29 Nov 2026 08:22:00 GMT"}

    metadata.says[f"GET {events}"] = json.dumps({"Events": [event("Preempt", "node-4"), event("Freeze", "node-3")]})
    assert ask() is None
    metadata.says[f"GET {events}"] = json.dumps({"Events": [event("Preempt", "node-3")]})
    assert ask() == "Azure: Preempt of this machine, not before Sun, 29 Nov 2026 08:22:00 GMT"


@pytest.mark.parametrize("said", ["", "no", "[]", "\x00"])
def test_a_service_that_says_nonsense_gives_no_notice(metadata: Metadata, said: str) -> None:
    metadata.says["PUT /latest/api/token"] = "token"
    metadata.says["GET /latest/meta-data/spot/instance-action"] = said
    with pytest.raises(ValueError, match=r"."):
        notice_source(f"aws@{metadata.address}")()


@pytest.mark.parametrize("setting", ["AWS", "relative/path", "/path@somewhere", "ibm@http://x"])
def test_other_settings_are_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="neither aws, gcp, azure nor the absolute path"):
        notice_source(setting)


def test_the_watch_tells_once_and_survives_a_service_that_is_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notice, answers = threading.Event(), iter([OSError("unreachable"), ValueError("nonsense"), None, "soon"])
    reasons: list[str] = []

    def source() -> str | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def on_notice(reason: str) -> None:
        reasons.append(reason)
        notice.set()

    watch = PreemptionWatch(source, on_notice, poll_seconds=0.01)
    assert notice.wait(30)
    watch.close()
    assert reasons == ["soon"]
    assert len([record for record in caplog.records if "unreachable" in record.message]) == 1
    assert next(answers, "over") == "over"
