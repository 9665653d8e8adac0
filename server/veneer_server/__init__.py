"""The Veneer server: a front process with the sockets, an engine process with the weights."""

__version__ = "0.1.0"
