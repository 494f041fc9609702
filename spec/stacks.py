"""The stacks of the reference architecture, as paths of sites begin with."""

STACKS = ("vision", "speech", "series", "encoder", "text", "joint", "decoder")
"""By what they do in a model of one sense, and by what they read in one of several; in the order of the dataflow."""
