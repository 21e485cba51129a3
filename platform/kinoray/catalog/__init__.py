"""The table of videos, where it comes from, and reading the bytes that its rows name."""
