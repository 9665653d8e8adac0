"""LoRA: for each group of projections, one launch that multiplies by A and one by B."""
