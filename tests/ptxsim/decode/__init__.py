"""Decoders of the instructions, one module for each family.

A decoder is `decode(program, opcode)`, registered under the instruction's first word; it emits instructions of the
native core. Every modifier must be asked for: one that nobody asks for is an error, never ignored.
"""

from .opcode import HANDLERS, Opcode, handles

# isort: split
from . import alu, async_copy, compare, control, convert, matrix, memory, warp

__all__ = ["HANDLERS", "Opcode", "handles"]
_FAMILIES = (alu, async_copy, compare, control, convert, matrix, memory, warp)
