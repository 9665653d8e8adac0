"""GGUF files for llama.cpp: of bases, merged models and adapters."""
