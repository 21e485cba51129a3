"""Predictions in use: rows, exports, corrections."""
