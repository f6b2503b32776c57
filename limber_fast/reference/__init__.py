"""Each op in plain differentiable PyTorch, written from the formula and independent of every backend."""
