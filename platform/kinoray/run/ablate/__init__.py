"""The ablation study: a set that asks for motion, appearance and their binding; every network on it."""
