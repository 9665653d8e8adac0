"""What a model's answer consists of: text, thinking, calls of tools. One parser per family."""
