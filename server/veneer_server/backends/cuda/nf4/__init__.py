"""NF4 weights, repacked once. Few rows are multiplied from 4 bits; for many, panels are
expanded to bfloat16."""
