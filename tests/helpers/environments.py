"""Settings of runs, as a config exports them."""

# The least that a run must be told
VALID = {
    "DGXSYSTEM": "DGXH100_1x8x4",
    "DGXNNODES": "1",
    "DGXNGPU": "8",
    "MINIBS": "4",
    "TP": "4",
    "LR": "4e-4",
    "MAX_STEPS": "800",
}
