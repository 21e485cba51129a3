"""A result table in use: rows, exports, corrections."""
