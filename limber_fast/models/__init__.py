"""The models that the ops serve: GPT-J, and the small CLIP of the demo."""
