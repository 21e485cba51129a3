"""kinoray: video classification at library scale on Ray. Start at cli.py, or at jobs/ for what a cluster runs."""

__version__ = "0.1.0"

__all__ = ["__version__"]
