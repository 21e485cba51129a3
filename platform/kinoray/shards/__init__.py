"""Tar shards: which video goes where, writing one, committing all."""
