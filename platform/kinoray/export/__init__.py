"""A result table in the forms of other tools."""
