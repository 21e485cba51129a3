"""Joining a cluster, submitting to it, and what its processes tell each other."""
