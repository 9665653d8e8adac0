"""Veneer beside other systems: the harness of ``veneer-loadtest compare``, and its peers."""
