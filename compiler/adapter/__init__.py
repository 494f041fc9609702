"""An adapter's tensors: what they are of, and what they were trained with."""
