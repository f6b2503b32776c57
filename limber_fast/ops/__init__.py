"""The contract of each op: documentation, argument checks, torch.library registration."""
