"""Tensor parallelism: each process has a part of every layer, and two sums a layer are shared.

The rules are those of Megatron-LM (arXiv 1909.08053), and for adapters of S-LoRA (2311.03285)
with one change: B of o and down is not divided, so that no gather is needed.

| projection | base | A | B |
| --- | --- | --- | --- |
| q, k, v, gate, up | divided by output | whole | divided by output |
| o, down | divided by input | divided by input | whole |

What o and down give is a partial sum, the adapter's included: one all-reduce adds both. Keys
and values are divided by head. Embedding, norms and head are whole everywhere.

`sharding` says who has what, `adapters` and `weights` cut, `peers` adds, `decoder` executes in
torch; the backend for CUDA has its own (`backends.cuda`).
"""
