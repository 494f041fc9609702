"""An artifact behind a server: requests for many profiles, answered in common batches."""
