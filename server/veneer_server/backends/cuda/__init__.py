"""Kernels for NVIDIA cards, in Triton: not served with yet, see docs/gpu.md.

Each folder is one subject. A file has one kernel, or two that only work together, with the
layouts of its tensors on top; ``reference.py`` beside it computes the same in plain torch.
Kernels use no inline assembly, so that Triton's interpreter runs on a CPU what a card runs
(``python -m tests.gpu``).

What a row's result may depend on: its own inputs, and sizes that a model fixes. Never which
rows share the launch, where it is among them, or in which order programs run. So splits of a
sum have fixed lengths, their parts are added in order, and nothing is added atomically.
"""
