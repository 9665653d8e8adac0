"""Tools of a request: which it may or must call, and the constraint that makes it do so."""
