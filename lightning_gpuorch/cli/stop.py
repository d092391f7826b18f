"""``gpuorch stop``: ask a running job of several nodes to finish what it holds and leave."""

from __future__ import annotations

import click

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import GPUOrchError

_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 10.0


@click.command(name="stop")
@click.option("--main-address", "--main_address", required=True, help="Host of the coordinator.")
@click.option("--main-port", "--main_port", type=int, default=29400, show_default=True, help="Port of the coordinator.")
def stop(main_address: str, main_port: int) -> None:
    """Stop a job of several nodes in good order, from anywhere; GPUORCH_TOKEN must be the job's.

    Every node finishes what it holds and ends with exit code 75; the same command goes on from there. A job on one node is
    stopped by Ctrl-C or SIGTERM to its `gpuorch run`.
    """
    from lightning_gpuorch.control.handshake import Peer
    from lightning_gpuorch.control.messages.ranks import DrainJob
    from lightning_gpuorch.control.tls import Certificates
    from lightning_gpuorch.control.transport import RemoteChannel

    config = OrchestratorConfig.resolve()
    address = f"{main_address}:{main_port}"
    try:
        channel = RemoteChannel(
            address, Peer("operator"), config.token or "", _CONNECT_SECONDS, certificates=Certificates.of(config)
        )
        try:
            channel.call(DrainJob(), timeout_seconds=_ANSWER_SECONDS)
        finally:
            channel.close()
    except GPUOrchError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"the job at {address} finishes what it holds, and ends with exit code 75")
