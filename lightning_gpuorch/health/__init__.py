"""GPU health: what NVML says and what follows from it."""
