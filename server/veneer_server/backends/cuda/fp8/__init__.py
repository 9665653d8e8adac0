"""FP8 weights (e4m3), a scale for each output: half of what bfloat16 takes, on every card."""
