"""HTML pages: how they are made, and their templates."""
