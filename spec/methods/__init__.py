"""The shipped methods, one YAML file each."""
