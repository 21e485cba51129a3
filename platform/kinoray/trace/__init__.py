"""Where a run's time went, from what it left in storage."""
