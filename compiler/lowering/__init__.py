"""A graph for the provider that runs it: attention, norms and maps as its own operations."""
