"""Training of the small CLIP within a budget of wall time."""
