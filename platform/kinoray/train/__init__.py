"""Catalog -> checkpoint: verb.py checks and starts, job.py runs workers, loop.py epochs, step.py a step."""
