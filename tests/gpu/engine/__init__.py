"""The backend for CUDA over the kernels, its memory and its graphs, without a card."""
