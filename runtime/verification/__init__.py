"""An artifact against PyTorch."""
