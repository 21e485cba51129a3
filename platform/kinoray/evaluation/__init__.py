"""Predictions and true classes -> numbers: accuracy, calibration, comparisons, ensembles."""
