"""What happens at ``trainer.predict(...)`` or ``fabric.launch()``: run here, or become the supervisor of workers."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.devices.discovery import device_pool
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError
from lightning_gpuorch.predictions.reading.reader import results
from lightning_gpuorch.strategies import lightning_internals
from lightning_gpuorch.supervisor.spawn import ForkSpawner, command_of_this_process, script_spawner
from lightning_gpuorch.supervisor.supervisor import Supervisor
from lightning_gpuorch.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from lightning_gpuorch.strategies.base import StrategyShell

log = logging.getLogger(__name__)

_RESULT = "_GPUORCH_RESULT"


class Launcher:
    """Lightning's launcher interface.

    Args:
        strategy: The strategy to launch for.
        start_method: ``popen`` runs the script again for each rank; ``fork`` forks this process.
    """

    def __init__(self, strategy: StrategyShell, start_method: str):
        if start_method not in ("popen", "fork"):
            raise ConfigurationError(f"start_method={start_method!r} is unknown; use 'popen' or 'fork'.")
        self._strategy, self._start_method = strategy, start_method

    @property
    def is_interactive_compatible(self) -> bool:
        """True: a notebook's cells are run by forking it."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call ``function`` in every worker; in a script, the launching process does not return.

        Args:
            function: What to run.
            *args: Its arguments.
            trainer: The Trainer, when it is one that launches.
            **kwargs: More arguments.

        Returns:
            What ``function`` returned; for ``trainer.predict`` every prediction of the job.
        """
        strategy = self._strategy
        self._check_size()
        if _predicting(trainer):
            strategy.runtime.check_default_root(trainer.default_root_dir)  # refused before processes are started
        if self._runs_here():
            configure_logging(strategy.config.log_level, rank=_rank(), replica=0)
            return self._call(function, args, kwargs, trainer)
        config = strategy.config
        configure_logging(config.log_level, rank=None, replica=0)
        tensor_parallel = config.tensor_parallel_size if isinstance(config.tensor_parallel_size, int) else None
        if strategy.num_processes % (tensor_parallel or 1):
            raise ConfigurationError(
                f"{strategy.num_processes} devices cannot be cut into replicas of tensor_parallel_size={tensor_parallel}; "
                f"choose a multiple of {tensor_parallel} devices."
            )
        devices = [d.index for d in strategy.parallel_devices or () if d.type == "cuda" and d.index is not None]
        fork = self._start_method == "fork" or lightning_internals.is_interactive() or _in_test_runner()
        if fork and lightning_internals.launches_nothing(function):
            raise ConfigurationError(
                f"fabric.launch() cannot start {strategy.num_processes} ranks from a notebook or a test runner: its process "
                "cannot be run again; pass it a function: fabric.launch(function)."
            )
        if fork and trainer is not None and trainer.state.fn == "fit":
            raise ConfigurationError("fit cannot bring weights back from forked workers; use strategy='ddp_notebook'.")
        spawner = (
            ForkSpawner(lambda: self._call_forked(function, args, kwargs, trainer))
            if fork
            else script_spawner(command_of_this_process(), config.enable_warm_start)
        )
        supervisor = Supervisor(
            spawner,
            strategy.num_processes,
            config,
            tensor_parallel_size=tensor_parallel,
            devices=device_pool(devices, config.spare_devices),
        )
        if fork:
            return self._run_forked(supervisor, trainer)
        code = supervisor.run()
        # Not sys.exit: the Trainer would take SystemExit for a failure of its own, and tell every callback and logger.
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)

    @property
    def runs_alone(self) -> bool:
        """Whether the job is this process: it has one device, and no one has made processes for it."""
        return not self._made_by_another and self._strategy.num_processes <= 1 and self._strategy.num_nodes == 1

    def _runs_here(self) -> bool:
        return self._made_by_another or self._strategy.num_processes <= 1

    @property
    def _made_by_another(self) -> bool:
        environment = self._strategy.cluster_environment
        return environment is not None and environment.creates_processes_externally

    def _check_size(self) -> None:
        """Refuse to run on fewer nodes or devices than asked for.

        Raises:
            ConfigurationError: The processes that there are do not make up what was asked for.
        """
        strategy = self._strategy
        if strategy.runtime.calibration is not None:
            return
        nodes, devices = strategy.num_nodes, strategy.num_processes
        if strategy.supervised_environment is not None:
            present = strategy.supervised_environment.num_nodes
            if nodes not in (1, present):
                raise ConfigurationError(
                    f"num_nodes={nodes} is asked for, and this job was launched on {present} nodes. Use gpuorch run "
                    f"--num-nodes {nodes}, or leave out num_nodes."
                )
        elif self._made_by_another:
            made = lightning_internals.external_world_size(strategy.cluster_environment)
            if made is not None and made < nodes * devices:
                raise ConfigurationError(
                    f"num_nodes={nodes} x devices={devices} are asked for, and {type(strategy.cluster_environment).__name__} "
                    f"has {made} processes. Start one process per device (srun --ntasks-per-node={devices}), or one per "
                    f"node that starts them: gpuorch run SCRIPT --devices {devices}."
                )
        elif nodes > 1:
            raise ConfigurationError(
                f"num_nodes={nodes} is asked for, and this process was started alone. Run on each node: gpuorch run "
                f"SCRIPT --num-nodes {nodes} --node-rank RANK --main-address HOST."
            )

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any, trainer: Any) -> Any:
        result = function(*args, **kwargs)
        if _predicting(trainer):
            return self._strategy.results()  # type: ignore[attr-defined]
        return result

    def kill(self, number: int) -> None:
        """Nothing: the Trainer calls it when a rank gets SIGTERM; a supervisor decides about the others."""

    # A notebook: the workers are forks, the results come back through files

    def _call_forked(self, function: Callable[..., Any], args: Any, kwargs: Any, trainer: Any) -> None:
        strategy = self._strategy
        strategy.become_worker()
        result = self._call(function, args, kwargs, trainer)
        path = os.environ.get(_RESULT)
        if path and strategy.runtime.world.topology.rank == 0:
            # Predictions are read from their directory; only whether they are wanted goes through the file.
            Path(path).write_bytes(pickle.dumps(result is not None if _predicting(trainer) else result))

    def _run_forked(self, supervisor: Supervisor, trainer: Any) -> Any:
        path = supervisor.run_directory / "result"
        supervisor.add_environment({_RESULT: str(path)})
        supervisor.keep_results = True
        code = supervisor.run()
        if code != 0:
            raise GPUOrchError(f"the workers ended with exit code {code}; their messages are above.")
        result = pickle.loads(path.read_bytes())
        supervisor.clean_up_at_exit()
        if _predicting(trainer):
            coordinator = supervisor.coordinator
            assert coordinator is not None  # a notebook is a job of one node
            return results(coordinator.jobs[max(coordinator.jobs)].directory) if result else None
        return result


def _in_test_runner() -> bool:
    """Whether this process runs tests: to run it again for each rank would run all tests again."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec is not None else Path(getattr(main, "__file__", None) or "").stem
    # The variable alone is no sign: scripts that a test starts inherit it.
    in_pytest = "PYTEST_CURRENT_TEST" in os.environ and "pytest" in sys.modules
    return in_pytest or name.split(".")[0] in ("pytest", "py", "unittest", "nose2")


def _predicting(trainer: Any) -> bool:
    return trainer is not None and trainer.state.fn == "predict"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
