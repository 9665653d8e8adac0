"""Who calls, and what that caller may do: keys, tokens, certificates and roles."""
