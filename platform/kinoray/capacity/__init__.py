"""Measured rates of your own videos -> nodes, hours and cost."""
