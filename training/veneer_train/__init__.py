"""QLoRA training of adapters, in the format that the server accepts."""
