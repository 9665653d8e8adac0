"""Kernels for NVIDIA GPUs, in Triton, and the backend over them (``--backend cuda``).

The kernels are checked on a CPU by Triton's interpreter; docs/gpu.md says what ran on a GPU.

Each folder is one subject. A file has one kernel, or two that only work together, and describes
the layouts of its tensors at the top; ``reference.py`` beside it computes the same in plain
torch. Kernels use no inline assembly, so that Triton's interpreter can run the same code on a
CPU (``python -m tests.gpu``).

A row's result may depend on its own inputs and on sizes that the model fixes, but never on
which rows share the launch, on the row's place among them, or on the order in which programs
run. So a sum is split into parts of fixed length, the parts are added in order, and nothing is
added atomically.
"""
