"""The whole path on a small generated set."""
