"""Property tests try the same examples every time, and take the time they need."""

from hypothesis import settings

settings.register_profile("unit", derandomize=True, deadline=None, database=None)
settings.load_profile("unit")
