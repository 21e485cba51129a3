"""One config tree a verb: what its flags, files and jobs may say. Nothing here does the work."""
