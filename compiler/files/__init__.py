"""Files that others may write to, or that a killed process left: checkpoints, the cache, folders in the making."""
