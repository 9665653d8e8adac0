"""From logits to tokens and log-probabilities without leaving the device.

The reference is the sampler that serves on CPUs, `veneer_server.engine.execution.sampler`.
"""
