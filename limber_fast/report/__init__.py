"""Reports: one self-contained HTML page and a JSON file."""
