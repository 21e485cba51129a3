"""Many trainings -> the best settings: space.py says what is tried, verb.py runs it, job.py is its part on Ray."""
