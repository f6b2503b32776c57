"""Checks of GPU code on a machine without a GPU. Tests import from here: `from gpu.interpret import interpreted`."""
