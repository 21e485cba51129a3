"""Sweeps: verb.py plans and runs them, trial.py is one training of a sweep."""
