"""Adapters written as other libraries read them."""
