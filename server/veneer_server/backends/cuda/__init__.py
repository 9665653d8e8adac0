"""Kernels for NVIDIA GPUs, in Triton, and the backend over them (``--backend cuda``).

Checked on a CPU by Triton's interpreter; docs/gpu.md says what ran on a GPU.

Each folder is one subject. A file has one kernel, or two that only work together, with the
layouts of its tensors on top; ``reference.py`` beside it computes the same in plain torch.
Kernels use no inline assembly, so that Triton's interpreter runs on a CPU what a card runs
(``python -m tests.gpu``).

What a row's result may depend on: its own inputs, and sizes that a model fixes. Never which
rows share the launch, where it is among them, or in which order programs run. So splits of a
sum have fixed lengths, their parts are added in order, and nothing is added atomically.
"""
