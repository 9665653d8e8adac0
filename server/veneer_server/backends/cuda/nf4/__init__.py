"""NF4 weights: repacked once, multiplied from 4 bits for few rows, expanded by panels for many."""
