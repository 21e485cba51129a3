"""Measured rates -> nodes, hours and cost."""
