"""FP8 weights (e4m3) with a scale per output: half the memory of bfloat16, on any GPU."""
