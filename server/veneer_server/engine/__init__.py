"""The engine process: scheduling, residency, execution and the step loop."""
