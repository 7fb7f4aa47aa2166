"""What a run is set to: the benchmark's rules, its schedule, the settings of the environment."""
