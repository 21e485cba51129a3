"""Catalog -> checkpoint: verb.py starts, feed.py and ingest.py bring batches, loop.py runs epochs, replica.py steps."""
