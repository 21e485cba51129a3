"""How a network gets in: an import string, a factory, a Protocol."""
