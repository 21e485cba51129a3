"""Decoding in child processes: pool.py hands out work, process.py is one child from outside, child.py from inside."""
