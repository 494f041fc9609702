"""What runs: torch attachment for training and reference, sessions, verification, the command line."""
