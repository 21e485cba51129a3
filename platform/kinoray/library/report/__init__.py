"""The static site of a result table."""
