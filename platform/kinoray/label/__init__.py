"""Catalog -> predictions, exactly once: verb.py plans and checks, stage.py is what a worker does with one unit."""
