"""Several adapters on one base made one, by rules on whole changes of weights."""
