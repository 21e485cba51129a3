"""Exact, mergeable counts: accuracy, calibration, paired tests."""
