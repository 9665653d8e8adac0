"""Tools in OpenAI's form: how requests name them, and how answers hold their calls."""
