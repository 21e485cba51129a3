"""Verbs as jobs on a cluster: sent, followed, looked at, stopped."""
