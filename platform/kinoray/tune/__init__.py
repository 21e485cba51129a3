"""Many trainings -> the best settings: space.py says what is tried, verb.py runs it, trial.py is one training."""
