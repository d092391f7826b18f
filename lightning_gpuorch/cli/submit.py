"""``gpuorch submit``: write what SLURM or Kubernetes needs to run a script on several nodes, and hand it over.

The engine places and restarts supervisors of nodes; chunks and results are this package's.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from lightning_gpuorch.cli.parameters import NodeCount

_SUBMIT_SECONDS = 60.0
_PORT = 29400


@click.group(name="submit")
def submit() -> None:
    """Run a script on the nodes of a SLURM or Kubernetes cluster."""


def _common(command: Any) -> Any:
    """Options of all engines."""
    for option in reversed(
        (
            click.option("--name", default=None, help="Name of the job; default that of the script."),
            click.option("--num-nodes", "--num_nodes", type=NodeCount(), default="1", show_default=True,
                         help="Nodes; 1:8 begins with one, and others join and leave."),
            click.option("--devices", type=int, default=1, show_default=True, help="GPUs of each node."),
            click.option("--grace-seconds", type=click.IntRange(1), default=120, show_default=True,
                         help="Time between the notice of a node's end and the end."),
            click.option("--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), default=None,
                         help="Write to this file; default standard output."),
            click.option("--submit", "hand_over", is_flag=True, help="Hand it over to the engine's client."),
            click.argument("script"),
            click.argument("script_args", nargs=-1, type=click.UNPROCESSED),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@submit.command(context_settings={"allow_interspersed_args": False})
@_common
@click.option("--partition", default=None, help="Partition.")
@click.option("--time", "time_limit", default=None, help="Time limit, such as 12:00:00; the work goes on in a new job.")
@click.option("--accelerator", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True, help="Hardware.")
def slurm(script: str, script_args: tuple[str, ...], hand_over: bool, output: Path | None, **options: Any) -> None:
    """A batch script for SLURM: one task per node, a notice before the time limit, a new start while work is left."""
    text = slurm_script(script, script_args, **options)
    _write(text, output)
    if hand_over:
        _hand_over(("sbatch",), text)


@submit.command(context_settings={"allow_interspersed_args": False})
@_common
@click.option("--image", required=True, help="Container image that holds the script and this package.")
@click.option(
    "--volume-claim", default=None, help="Persistent volume claim for the output directory, mounted at /data."
)
@click.option("--token-secret", default=None, help="Secret with the key `token`; default NAME.")
@click.option(
    "--output-dir", default=None, help="Output directory of the script, for pods that come when the job has ended."
)
@click.option("--queue", default=None, help="Local queue of Kueue.")
@click.option("--namespace", default=None, help="Namespace.")
def kubernetes(script: str, script_args: tuple[str, ...], hand_over: bool, output: Path | None, **options: Any) -> None:
    """An Indexed Job for Kubernetes, and the Service by which its pods find the first one."""
    text = kubernetes_manifest(script, script_args, **options)
    _write(text, output)
    if hand_over:
        _hand_over(("kubectl", "apply", "-f", "-"), text)


def slurm_script(
    script: str,
    script_args: tuple[str, ...],
    *,
    name: str | None,
    num_nodes: tuple[int, int],
    devices: int,
    grace_seconds: int,
    partition: str | None,
    time_limit: str | None,
    accelerator: str,
) -> str:
    """The text of a batch script."""
    fewest, most = num_nodes
    directives = {
        "job-name": name or _name_of(script),
        "nodes": str(most),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(devices)} if accelerator == "gpu" else {"cpus-per-task": str(devices)}),
        **({"partition": partition} if partition else {}),
        **({"time": time_limit} if time_limit else {}),
        "signal": f"TERM@{grace_seconds}",
        "open-mode": "append",
    }
    flags = ["requeue", *(["no-kill"] if fewest < most else [])]
    command = ["gpuorch", "run", "--accelerator", accelerator, "--devices", str(devices)]
    if fewest < most:
        command += ["--num-nodes", f"{fewest}:{most}"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in directives.items()),
        *(f"#SBATCH --{flag}" for flag in flags),
        "",
        "# A node that leaves early ends with 75, which must not end the others.",
        f"srun --kill-on-bad-exit=0 --wait=0 {shlex.join([*command, script, *script_args])}",
        "code=$?",
        "# 75: stopped in good order, and work is left. The same job goes on from what is durable.",
        "# SLURM ends this script when it has taken the job back; until then an exit code would end the job.",
        'if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID" && sleep 600; fi',
        'exit "$code"',
        "",
    ]
    return "\n".join(lines)


def kubernetes_manifest(
    script: str,
    script_args: tuple[str, ...],
    *,
    name: str | None,
    num_nodes: tuple[int, int],
    devices: int,
    grace_seconds: int,
    image: str,
    volume_claim: str | None,
    token_secret: str | None,
    output_dir: str | None,
    queue: str | None,
    namespace: str | None,
) -> str:
    """The text of the manifest."""
    import yaml  # type: ignore[import-untyped]

    name = name or _name_of(script)
    fewest, most = num_nodes
    metadata: dict[str, Any] = {"name": name, **({"namespace": namespace} if namespace else {})}
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    nodes = str(most) if fewest == most else f"{fewest}:{most}"
    container: dict[str, Any] = {
        "name": "gpuorch",
        "image": image,
        "command": [
            "gpuorch", "run", "--devices", str(devices), "--num-nodes", nodes, "--node-rank", "$(JOB_COMPLETION_INDEX)",
            "--main-address", f"{name}-0.{name}", "--main-port", str(_PORT), script, *script_args,
        ],
        "env": [{"name": "GPUORCH_TOKEN",
                 "valueFrom": {"secretKeyRef": {"name": token_secret or name, "key": "token"}}}],
        "resources": {"limits": {"nvidia.com/gpu": devices}},
    }  # fmt: skip
    if output_dir:
        container["env"].append({"name": "GPUORCH_LATE_NODE_OUTPUT_DIR", "value": output_dir})
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if volume_claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": volume_claim}})
        mounts.append({"name": "data", "mountPath": "/data"})
    container["volumeMounts"] = mounts
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        # The pods find each other before they are ready.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True,
                 "selector": {"batch.kubernetes.io/job-name": name}},
    }  # fmt: skip
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, **({"labels": labels} if labels else {})},
        "spec": {
            "completionMode": "Indexed",
            "completions": most,
            "parallelism": most,
            "backoffLimitPerIndex": 10,
            "maxFailedIndexes": most,
            "podReplacementPolicy": "Failed",
            **({"suspend": True} if queue else {}),
            # A pod that was told to leave has done nothing wrong: it comes back, and is not counted.
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailJob",
                     "onExitCodes": {"containerName": "gpuorch", "operator": "In", "values": [65, 78]}},
                ]
            },
            "template": {
                "spec": {
                    "subdomain": name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": grace_seconds,
                    "containers": [container],
                    "volumes": volumes,
                }
            },
        },
    }  # fmt: skip
    return "---\n".join(yaml.safe_dump(document, sort_keys=False) for document in (service, job))


def _name_of(script: str) -> str:
    """A name that every engine takes."""
    return re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")[:50] or "gpuorch"


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text)


def _hand_over(command: tuple[str, ...], text: str) -> None:
    """Give a text to a program that submits it.

    Raises:
        click.ClickException: It is not installed, or refuses.
    """
    if shutil.which(command[0]) is None:
        raise click.ClickException(f"{command[0]} is not installed here; write the text to a file with --output.")
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SUBMIT_SECONDS, check=False)
    if done.returncode:
        raise click.ClickException(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    print(done.stdout, end="", file=sys.stderr)
