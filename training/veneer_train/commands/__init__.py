"""The commands of ``veneer-train``, a module for each group."""
