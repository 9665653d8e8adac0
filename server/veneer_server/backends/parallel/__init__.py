"""Tensor parallelism: each process has a part of every layer; two all-reduces join each layer.

The base is divided as in Megatron-LM (arXiv 1909.08053), adapters as in S-LoRA (2311.03285)
with one change: B of o and down is not divided, so that no gather is needed.

| projection | base | A | B |
| --- | --- | --- | --- |
| q, k, v, gate, up | divided by output | whole | divided by output |
| o, down | divided by input | divided by input | whole |

The output of o and of down is a partial sum that includes the adapter's part, so one all-reduce
adds both. Keys and values are divided by head. Every process has the whole embedding, the norms
and the output head.

`sharding` computes each process's ranges, `adapters` and `weights` cut tensors to them, `peers`
adds the partial sums, and `decoder` executes steps in torch. The CUDA backend has its own
decoder (`backends.cuda`), which `leading` drives: one process leads, the others follow.
"""
