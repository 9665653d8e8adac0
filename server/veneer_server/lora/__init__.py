"""LoRA at run time: resident adapters and the batched products over segments."""
