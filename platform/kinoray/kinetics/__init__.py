"""Kinetics as it is handed around: names, annotation files, and one verdict for every row and file."""
