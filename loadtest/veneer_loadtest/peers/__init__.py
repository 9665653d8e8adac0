"""Other people's servers, started for a comparison: vLLM and llama.cpp over HTTP."""
