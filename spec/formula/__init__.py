"""The expression language: its text, its functions, its sizes."""
