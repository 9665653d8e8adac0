"""What vLLM adds to OpenAI's requests and answers."""
