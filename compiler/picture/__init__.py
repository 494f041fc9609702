"""The picture of a model and of the modules in it."""
