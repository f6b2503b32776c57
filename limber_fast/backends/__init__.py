"""One module per backend, imported on first use by limber_fast.dispatch."""
