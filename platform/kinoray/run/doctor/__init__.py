"""A cluster and each of its nodes, examined from inside."""
