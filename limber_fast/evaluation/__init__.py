"""Zero-shot classification, its baselines, and a linear probe."""
