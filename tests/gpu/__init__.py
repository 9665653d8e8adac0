"""Checks of the kernels in ``veneer_server/backends/cuda`` without a card: docs/gpu.md."""
