"""Optical flow between frames: dis.py on the CPU, tvl1.py and raft.py on the device of the network."""
