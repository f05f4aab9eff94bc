"""Training runs: building what a configuration describes, training it, its folder on disk, opening it again."""
