"""Adapters that other libraries trained, read into a spec of ours and its tensors."""
