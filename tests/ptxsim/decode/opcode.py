"""An instruction as text: name, modifiers, operands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from .. import isa
from ..parser import TYPE_SIZE

if TYPE_CHECKING:
    from ..program import Program

T = TypeVar("T")
Handler = Callable[["Program", "Opcode"], object]
HANDLERS: dict[str, Handler] = {}

# How many operands an instruction has, where its decoder does not find out by itself
_UNARY = "not cnot abs neg popc clz brev bfind ex2 lg2 rcp rsqrt sqrt sin cos tanh mov cvta testp isspacep movmatrix"
_BINARY = "add sub addc subc mul mul24 div rem and or xor shl shr copysign bmsk szext"
_TERNARY = "mad madc mad24 fma bfe sad fns shf prmt dp4a dp2a selp slct"
OPERANDS = {
    **dict.fromkeys(_UNARY.split(), (2,)),
    **dict.fromkeys(_BINARY.split(), (3,)),
    **dict.fromkeys(_TERNARY.split(), (4,)),
    **dict.fromkeys(("min", "max", "setp", "set"), (3, 4)),
    **dict.fromkeys(("ld", "ldu", "st", "ldmatrix", "stmatrix", "brx", "elect"), (2,)),
    **dict.fromkeys(("bfi", "shfl"), (5,)),
    "lop3": (5, 6),
    "bra": (1,),
    "vote": (2, 3),
    "match": (3,),
    "redux": (3,),
    "mma": (4,),
}

NARROW_FLOATS = {"e4m3", "e5m2"}  # types of matrix operands only


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers a decoder."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Opcode:
    """`args` are the operands; the methods look modifiers up and mark them as understood."""

    def __init__(self, text: str, args: list[str], fail: Callable[[str], object]):
        self.text = text
        self.name, *self.modifiers = text.split(".")
        self.args = args
        self.fail = fail
        self.types = [m for m in self.modifiers if m in TYPE_SIZE or m in NARROW_FLOATS]
        self.unused = [m for m in self.modifiers if m not in self.types]

    def check_operands(self) -> None:
        count = len(self.args) - ("L2::cache_hint" in self.modifiers)
        wanted = OPERANDS.get(self.name)
        if self.name == "shfl" and "sync" not in self.modifiers:
            wanted = (4,)
        if wanted and count not in wanted:
            self.fail(f"'{self.text}' has {count} operands, not {' or '.join(map(str, wanted))}")

    @property
    def type(self) -> str:
        return self.types[-1] if self.types else "b32"

    def has(self, *names: str) -> bool:
        """Is any of these there?"""
        found = any(name in self.modifiers for name in names)
        self.ignore(names)
        return found

    def has_all(self, *names: str) -> bool:
        if not all(name in self.modifiers for name in names):
            return False
        self.ignore(names)
        return True

    def ignore(self, names: Iterable[str]) -> None:
        self.unused = [m for m in self.unused if m not in names]

    def choose(self, table: Mapping[str, T], default: T) -> T:
        """The entry of the first modifier that is in the table."""
        for modifier in self.modifiers:
            if modifier in table:
                self.ignore([modifier])
                return table[modifier]
        return default

    def require(self, table: Mapping[str, T]) -> T:
        for modifier in self.modifiers:
            if modifier in table:
                self.ignore([modifier])
                return table[modifier]
        raise ValueError(f"needs one of .{', .'.join(table)}")

    def drop_cache_hints(self) -> None:
        """Cache operators and eviction policies; the operand of .L2::cache_hint goes too."""
        if "L2::cache_hint" in self.modifiers:
            self.args.pop()
        self.ignore(isa.CACHE_HINTS)

    def finish(self) -> None:
        if self.unused:
            self.fail(f"unknown instruction form '{self.text}' (modifier .{self.unused[0]})")


def float_modifiers(opcode: Opcode) -> dict:
    """Arguments of Program.emit for the modifiers of floating-point instructions."""
    flags = [
        flag
        for modifier, flag in (
            ("sat", "Sat"),
            ("ftz", "Ftz"),
            ("relu", "Relu"),
            ("NaN", "PropagateNan"),
            ("xorsign", "XorSign"),
            ("satfinite", "SatFinite"),
            ("approx", "Approx"),
        )
        if opcode.has(modifier)
    ]
    if "XorSign" in flags:
        opcode.ignore(["abs"])
    return {"flags": flags, "rounding": opcode.choose(isa.ROUNDINGS, 0)}
