"""Real encoded videos made from nothing, for the demo, the tests and the studies."""
