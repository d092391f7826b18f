"""Writes dashboard.json, the Grafana dashboard of lightning_gpuorch: ``python docs/monitoring/make_dashboard.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ALL = 'instance=~"$instance", rank=~"$rank"'
NODE = 'instance=~"$instance"'
VERDICTS = [(0, "healthy", "green"), (1, "degraded", "yellow"), (2, "drain", "orange"), (3, "failed", "red"),
            (-1, "unknown", "gray")]  # fmt: skip

Query = tuple[str, str]
"""Expression and legend."""


class Dashboard:
    """Places panels from left to right, row by row, on Grafana's grid of 24 columns."""

    def __init__(self) -> None:
        self.panels: list[dict[str, Any]] = []
        self._x = self._y = self._row_height = 0

    def row(self, title: str) -> None:
        """Begin a titled row."""
        self._break()
        self._add("row", title, 24, 1, collapsed=False, panels=[])
        self._break()

    def panel(
        self, kind: str, title: str, queries: list[Query], unit: str, width: int, height: int = 8, **options: Any
    ) -> None:
        """Add a panel.

        Args:
            kind: Grafana's panel type.
            title: Above it.
            queries: What it shows.
            unit: Grafana's unit id.
            width: In columns of 24.
            height: In grid units.
            **options: ``description``, ``thresholds`` (value, colour), ``mappings``.
        """
        defaults: dict[str, Any] = {"unit": unit}
        if "thresholds" in options:
            steps = [{"value": value, "color": color} for value, color in options["thresholds"]]
            defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if "mappings" in options:
            texts = {str(v): {"text": t, "color": c, "index": i} for i, (v, t, c) in enumerate(options["mappings"])}
            defaults["mappings"] = [{"type": "value", "options": texts}]
        targets = [
            {
                "refId": "ABCDEFGH"[i],
                "expr": expression,
                "legendFormat": legend,
                "datasource": DATASOURCE,
                **({"format": "heatmap"} if kind == "heatmap" else {}),
            }
            for i, (expression, legend) in enumerate(queries)
        ]
        self._add(
            kind, title, width, height, description=options.get("description", ""), datasource=DATASOURCE,
            targets=targets, fieldConfig={"defaults": defaults, "overrides": []}, options={},
        )  # fmt: skip

    def _add(self, kind: str, title: str, width: int, height: int, **fields: Any) -> None:
        if self._x + width > 24:
            self._break()
        place = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append({"id": len(self.panels) + 1, "type": kind, "title": title, "gridPos": place, **fields})
        self._x += width
        self._row_height = max(self._row_height, height)

    def _break(self) -> None:
        self._y += self._row_height
        self._x = self._row_height = 0


def rate(metric: str, labels: str = ALL) -> str:
    """Growth of a counter per second."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def quantile(q: float, metric: str, by: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, sum by (le, {by}) ({rate(metric + '_bucket')}))"


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    d = Dashboard()
    d.row("Is it working?")
    d.panel(
        "stat", "Ranks up", [(f"sum(distributed_inference_rank_up{{{NODE}}})", "up"),
                             (f"count(distributed_inference_rank_up{{{NODE}}})", "of")], "none", 4, 4,
        description="Ranks whose process writes metrics; a rank that ended as it should is not counted.",
    )  # fmt: skip
    d.panel("stat", "Samples per second", [(f"sum({rate('distributed_inference_samples_total')})", "")], "ops", 5, 4)
    d.panel(
        "stat", "Scaling efficiency", [(f"distributed_scaling_efficiency_percent{{{NODE}}}", "")], "percent", 5, 4,
        description="Throughput against devices x the recorded single-device baseline; empty without a baseline.",
        thresholds=[(None, "red"), (60, "orange"), (85, "green")],
    )  # fmt: skip
    d.panel(
        "stat", "Oldest step", [(f"time() - min(distributed_inference_last_step_timestamp_seconds{{{ALL}}})", "")],
        "s", 5, 4, description="Time since the rank that is furthest behind completed a step.",
        thresholds=[(None, "green"), (30, "orange"), (120, "red")],
    )  # fmt: skip
    d.panel(
        "stat", "Recoveries",
        [(f"sum(increase(distributed_inference_oom_events_total{{{ALL}}}[$__range]))", "out of memory"),
         (f"sum(increase(distributed_inference_rank_restarts_total{{{ALL}}}[$__range]))", "restarts")], "none", 5, 4,
    )  # fmt: skip
    d.row("Speed")
    step = "distributed_inference_step_seconds"
    d.panel(
        "timeseries", "Step time per rank",
        [(quantile(0.5, step, "rank"), "p50 rank {{rank}}"), (quantile(0.99, step, "rank"), "p99 rank {{rank}}")],
        "s", 12,
    )  # fmt: skip
    d.panel("heatmap", "Step time, all ranks", [(f"sum by (le) ({rate(step + '_bucket')})", "{{le}}")], "s", 12)
    d.panel(
        "timeseries", "Samples per second per rank", [(rate("distributed_inference_samples_total"), "rank {{rank}}")],
        "ops", 12, description="One rank of a tensor-parallel group counts its samples.",
    )  # fmt: skip
    d.panel("timeseries", "Steps per second per rank", [(rate("distributed_inference_steps_total"), "rank {{rank}}")],
            "ops", 6)  # fmt: skip
    d.panel("timeseries", "Batch size", [(f"distributed_inference_batch_size{{{ALL}}}", "rank {{rank}}")], "none", 6)
    d.row("Communication")
    communication = "distributed_communication_latency_seconds"
    d.panel(
        "timeseries", "Share of time in collectives",
        [(f"sum by (instance, rank) ({rate(communication + '_sum')})", "rank {{rank}}")], "percentunit", 12,
        description="Waiting for other ranks is part of it: the rank that waits least is the one the others wait for.",
    )  # fmt: skip
    d.panel(
        "timeseries", "Latency of collectives, p99", [(quantile(0.99, communication, "op"), "{{op}}")], "s", 6,
    )  # fmt: skip
    d.panel("timeseries", "Probe all-reduce", [(f"distributed_probe_seconds{{{ALL}}}", "rank {{rank}}")], "s", 6)
    d.row("Devices")
    d.panel("timeseries", "Memory",
            [(f"gpu_memory_usage_bytes{{{ALL}}}", "rank {{rank}}"),
             (f"gpu_memory_limit_bytes{{{ALL}}}", "limit {{rank}}")], "bytes", 12)  # fmt: skip
    d.panel(
        "state-timeline", "Health", [(f"gpu_health_status{{{ALL}}}", "rank {{rank}}")], "none", 12, mappings=VERDICTS
    )
    for title, metric, unit in (
        ("Temperature", "gpu_temperature_celsius", "celsius"),
        ("Power", "gpu_power_watts", "watt"),
        ("Clock", "gpu_sm_clock_hertz", "hertz"),
        ("Utilization", "gpu_utilization_ratio", "percentunit"),
    ):
        d.panel("timeseries", title, [(f"{metric}{{{ALL}}}", "rank {{rank}}")], unit, 6, 7)
    d.panel("timeseries", "Errors of the GPU",
            [(f"increase(gpu_xid_errors_total{{{ALL}}}[$__rate_interval])", "XID rank {{rank}}"),
             (f"gpu_ecc_uncorrected_errors{{{ALL}}}", "uncorrected ECC rank {{rank}}")], "none", 12, 7)  # fmt: skip
    d.panel("timeseries", "Failures of observers, which the run survives",
            [(f"increase(gpuorch_observer_failures_total{{{ALL}}}[$__rate_interval])", "{{observer}} rank {{rank}}")],
            "none", 12, 7)  # fmt: skip
    return {
        "uid": "lightning-gpuorch",
        "title": "Distributed inference",
        "tags": ["lightning_gpuorch"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "timezone": "browser",
        "graphTooltip": 1,
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
                _variable("instance", "label_values(distributed_inference_rank_info, instance)"),
                _variable("rank", 'label_values(distributed_inference_rank_info{instance=~"$instance"}, rank)'),
            ]
        },
        "panels": d.panels,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "datasource": DATASOURCE, "query": {"query": query, "refId": name},
        "multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}, "refresh": 2, "sort": 3,
    }  # fmt: skip


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.json").write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")
