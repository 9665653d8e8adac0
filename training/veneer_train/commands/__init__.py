"""The commands of ``veneer-train``, one module per group."""
