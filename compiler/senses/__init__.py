"""What a model reads besides text, and how: example inputs made from the model itself."""
