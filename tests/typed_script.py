"""A user's script, read by mypy with the package: an ignored error that is none is reported."""

from lightning_gpuorch import MultiGPUOrchestrator
from lightning_gpuorch.fabric import GPUOrchStrategy as FabricStrategy
from lightning_gpuorch.pytorch import GPUOrchStrategy

GPUOrchStrategy(enable_dynamic_batching=True, on_error="raise", output_dir="x")
FabricStrategy(tensor_parallel_size="auto")
MultiGPUOrchestrator(chunk_size="auto")
GPUOrchStrategy(on_error="rise")  # type: ignore[arg-type]
FabricStrategy(output_dirr="x")  # type: ignore[call-arg]
MultiGPUOrchestrator(chunk_size=0.5)  # type: ignore[arg-type]
