"""What a network is, where it comes from, its checkpoints, and clips through it.

A network's own code imports this and nothing else of kinoray: what is named here costs it no other import.
"""

from kinoray.network.spec import IMAGENET_MEAN, IMAGENET_STD, ClipRecipe, InputSpec, PublishedNetwork

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ClipRecipe", "InputSpec", "PublishedNetwork"]
