"""The engine: scheduler, residency and step loop, and the facade that the front uses."""
