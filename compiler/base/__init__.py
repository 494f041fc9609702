"""A model as the compiler knows it: its graph without weights, and where each weight lies."""
