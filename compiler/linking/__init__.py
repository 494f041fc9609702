"""Profiles of an artifact whose modules are exchanged while it runs: what they hold, and how they are made."""
