"""What can be said of a config before it is queued: memory, time, convergence, and the plan that preflight.py prints."""
