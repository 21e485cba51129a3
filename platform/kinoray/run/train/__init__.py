"""Training: verb.py checks and starts, feed.py and ingest.py bring batches, loop.py runs epochs, replica.py steps."""
