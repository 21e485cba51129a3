"""How fast a machine labels, and what binds: decoding, the network and the whole job in one run."""
