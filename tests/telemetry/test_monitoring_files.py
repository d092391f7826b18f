"""The dashboard and the alert rules against what the exporter really shows."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.telemetry import FailureTally, RankMetrics, read_endpoint
from lightning_gpuorch.telemetry.metrics.exposition import merge_directory, snapshot_name, write_text
from tests.telemetry.test_exporter import Ranks, eventually, free_port, ranks
from tests.telemetry.test_metrics import parse

__all__ = ["ranks"]  # the fixture

DIRECTORY = Path(__file__).parents[2] / "docs" / "monitoring"
FUNCTIONS = {
    "sum", "count", "min", "max", "rate", "increase", "time", "quantile", "histogram_quantile", "predict_linear", "by",
    "on", "and", "without", "group_left", "le", "rank", "op", "instance", "job", "replica", "label_values",
}  # fmt: skip
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series name the exporter can show, with its labels."""
    directory = tmp_path_factory.mktemp("metrics")
    tally = FailureTally()
    tally.add("events")
    metrics = RankMetrics(0, failures=tally)
    metrics.observe_step(0.1, 2)
    metrics.observe_collective("all_reduce", 0.1)
    metrics.set_scaling_efficiency(90)
    metrics.observe_device(
        memory_used_bytes=1, memory_total_bytes=1, temperature_celsius=1, power_watts=1, sm_clock_hertz=1,
        utilization_ratio=1, ecc_uncorrected=1,
    )  # fmt: skip
    metrics.health_status.set(0)
    metrics.probe_seconds.set(1)
    metrics.probe_bandwidth.set(1)
    (directory / snapshot_name(0, 0)).write_bytes(write_text(metrics.registry))
    found: dict[str, set[str]] = {}
    for name, labels in parse(merge_directory(directory)):
        found.setdefault(name, set()).update({"instance", "job"}, dict(labels))
    return found


def dashboard_queries() -> list[str]:
    dashboard = json.loads((DIRECTORY / "dashboard.json").read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return panels + [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def rule_queries() -> tuple[list[str], set[str]]:
    """Expressions of the rules, and the names they record."""
    text = (DIRECTORY / "alerts.yml").read_text(encoding="utf-8")
    expressions = re.findall(r"expr: (?:\|\n((?: {10,}.*\n)+)|(.*))", text)
    return [block or line for block, line in expressions], set(re.findall(r"record: (\S+)", text))


def names_in(query: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|\$\w+", "", query)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - FUNCTIONS


def test_the_dashboard_is_what_its_generator_makes() -> None:
    build = runpy.run_path(str(DIRECTORY / "make_dashboard.py"))["build"]
    assert json.loads((DIRECTORY / "dashboard.json").read_text(encoding="utf-8")) == build()


def test_the_dashboard_is_well_formed() -> None:
    dashboard = json.loads((DIRECTORY / "dashboard.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_query_asks_for_metrics_and_labels_that_exist(exported: dict[str, set[str]]) -> None:
    expressions, recorded = rule_queries()
    assert len(expressions) == 14
    queries = dashboard_queries() + expressions
    for query in queries:
        assert names_in(query) - exported.keys() - recorded == set(), query
    for metric, selector in re.findall(r"(\w+)\{([^}]*)\}", " ".join(queries)):
        assert set(re.findall(r"(\w+)\s*=", selector)) <= exported[metric], metric
    shown = set().union(*map(names_in, queries))
    unused = {name for name in exported if name not in shown} - {
        "gpuorch_build_info", "distributed_probe_bandwidth_bytes_per_second", "distributed_inference_step_seconds_count",
        "distributed_communication_latency_seconds_count", "distributed_inference_step_seconds_sum",
    }  # fmt: skip
    assert unused == set(), "a metric that nobody looks at"


@needs_promtool
def test_the_alert_rules_pass_their_own_tests() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=DIRECTORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    queries = [q for q in dashboard_queries() if not q.startswith("label_values")]
    rules = [
        {"record": f"q{i}", "expr": q.replace("$__rate_interval", "1m").replace("$__range", "1h")}
        for i, q in enumerate(queries)
    ]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


class Server:
    """A real Prometheus server that scrapes one port every 200 ms, by default with the alert rules of the documentation."""

    def __init__(self, directory: Path, target: int, rules: Path = DIRECTORY / "alerts.yml"):
        directory.mkdir()
        config = {
            "global": {"scrape_interval": "200ms", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "gpuorch", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))
        self.port = free_port()
        with open(directory / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={directory / 'prometheus.yml'}",
                 f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=5) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[str, float]:
        """Value by rank."""
        found = self.ask(f"query?query={urllib.request.quote(expression)}")["result"]
        return {series["metric"].get("rank", ""): float(series["value"][1]) for series in found}


@pytest.fixture
def prometheus(ranks: Ranks, tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "prometheus", ranks.port)
    yield server
    server.process.kill()
    server.process.wait(10)


@needs_prometheus
def test_a_real_server_sees_no_reset_when_the_serving_rank_is_killed(ranks: Ranks, prometheus: Server) -> None:
    running = [ranks.start(0), ranks.start(1)]
    for process in running:
        assert ranks.hear(process) == "begun"
        ranks.tell(process, "step 50")
        assert ranks.hear(process) == "done"
    eventually(lambda: prometheus.query("distributed_inference_steps_total") == {"0": 50, "1": 50}, 30)
    serving = eventually(lambda: read_endpoint(ranks.directory))["rank"]
    running[serving].kill()
    running[serving].wait(10)
    killed_at = time.monotonic()
    eventually(lambda: prometheus.query("distributed_inference_rank_up").get(str(serving)) == 0, 30)
    print(f"endpoint back and the dead rank shown as down after {time.monotonic() - killed_at:.1f} s")
    again = ranks.start(serving, generation=1)
    assert ranks.hear(again) == "begun"
    ranks.tell(again, "step 25")
    assert ranks.hear(again) == "done"
    expected = {str(serving): 75.0, str(1 - serving): 50.0}
    eventually(lambda: prometheus.query("distributed_inference_steps_total") == expected, 30)
    assert prometheus.query("resets(distributed_inference_steps_total[5m])") == {"0": 0, "1": 0}
    assert prometheus.query("resets(distributed_inference_step_seconds_count[5m])") == {"0": 0, "1": 0}
    assert prometheus.query("distributed_inference_rank_restarts_total")[str(serving)] == 1
    found = {series["__name__"] for series in prometheus.ask("series?match[]={job=%22gpuorch%22}")}
    assert {
        "distributed_inference_steps_total", "distributed_inference_step_seconds_bucket", "gpu_memory_usage_bytes",
        "distributed_communication_latency_seconds_sum", "distributed_inference_samples_total",
        "distributed_inference_rank_up", "distributed_inference_last_step_timestamp_seconds",
    } <= found  # fmt: skip
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    eventually(
        lambda: {
            rule["health"] for group in prometheus.ask("rules")["groups"] for rule in group["rules"]
        } == {"ok"}, 30,
    )  # fmt: skip
    assert len(rules) == 14


def test_the_tables_in_the_documentation_are_those_of_the_code() -> None:
    pages = runpy.run_path(str(DIRECTORY / "make_tables.py"))
    assert (DIRECTORY / "events.md").read_text(encoding="utf-8") == pages["events"]()
    assert (DIRECTORY / "verdicts.md").read_text(encoding="utf-8") == pages["verdicts"]()


def test_the_documentation_names_every_metric_and_no_other(exported: dict[str, set[str]]) -> None:
    text = (DIRECTORY / "index.md").read_text(encoding="utf-8")
    table = text[text.index("| metric |") : text.index("A gauge whose value")]
    named = set(re.findall(r"`(\w+)`", table))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    assert named == families


def test_links_of_the_page_lead_somewhere() -> None:
    text = (DIRECTORY / "index.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"\{download\}`([^`]+)`", text)
    assert len(targets) == 10
    assert [target for target in targets if not (DIRECTORY / target).exists()] == []
