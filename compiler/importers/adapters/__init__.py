"""Adapters of AdapterHub's library `adapters`."""
