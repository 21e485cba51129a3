"""What a network is, where it comes from, its checkpoints, and clips through it."""
