"""Every decision, before anything is written."""
