"""What is wrong with videos, a machine, a store or a cluster. verb.py puts the sections together."""
