"""The commands of ``veneer-loadtest``, one module each."""
