"""The settings: trees of frozen dataclasses, what they are checked for, and their YAML."""
