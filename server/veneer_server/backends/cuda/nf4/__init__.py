"""NF4 weights: repacked once; multiplied from 4 bits for few rows, else expanded by panels."""
