"""Texts that grow together: generation in batches that texts join and leave between any two tokens."""
