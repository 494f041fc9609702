"""From a spec to a verified artifact."""
