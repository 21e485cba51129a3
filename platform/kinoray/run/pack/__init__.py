"""Packing: a folder or list (verb.py), Kinetics (kinetics.py), and the tasks both share."""
