"""LoRA: for each group of projections one launch that shrinks and one that expands."""
