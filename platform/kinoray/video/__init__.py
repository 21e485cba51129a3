"""Bytes of a video -> the frames that are wanted. Start at clip.py; plan.py says which packets are needed."""
