"""Execute compiled PTX on CPU tensors, and trap what a GPU forbids: `execute`."""

from .execute import Counts, execute
from .values import PtxTrap, UnknownInstruction

__all__ = ["Counts", "PtxTrap", "UnknownInstruction", "execute"]
