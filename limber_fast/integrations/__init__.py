"""Drop-in use: other libraries' models with their modules swapped for ours."""
