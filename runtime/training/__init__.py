"""Modules on a torch model."""
