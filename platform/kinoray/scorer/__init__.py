"""Clips in batches through a network, and the answers that come out."""
