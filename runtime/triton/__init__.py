"""An artifact as a model repository of the Triton Inference Server: one base, and profiles as data."""
