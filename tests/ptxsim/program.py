"""A kernel and the functions it calls, decoded for the native core."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np

from . import isa
from .decode import HANDLERS, Opcode
from .errors import PtxError
from .native import core
from .parser import TYPE_SIZE, Function, Module, Scope, Statement, Variable, parse_int, split_top

SINK_BYTES = 256  # the register file begins with a place for results nobody wants
REG32, REG64, PREDICATE, NOT_PREDICATE = range(4)  # OperandKind of instruction.hpp

_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_DECIMAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+")
_SYMBOL = re.compile(r"([\w$]+)\s*([-+]\s*\d+)?")
_ADDRESS = re.compile(r"([%\w$]+)\s*(?:\+\s*)?([-+]?\s*(?:0[xX][0-9a-fA-F]+|\d+))?")


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _as_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _float_bits(value: float, code: str) -> int:
    return int.from_bytes(struct.pack(code, value), "little")


def _double_to_float_bits(value: float) -> int:
    try:
        return _float_bits(value, "<f")
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


class Program:
    """Decodes kernel `name`; `machine` then runs it. `symbols` are the addresses of the module's variables."""

    def __init__(self, module: Module, name: str, symbols: dict[str, int], param_base: int):
        native = core()
        self.module, self.symbols, self.param_base = module, symbols, param_base
        self.opcodes, self.modifiers = native.OPCODES, native.MODIFIERS
        self.types = {key.lower(): value for key, value in native.TYPES.items()}
        self.shifts = (native.COMPARE_SHIFT, native.BOOL_SHIFT, native.ROUNDING_SHIFT, native.SPACE_SHIFT)
        self.shared_window, self.local_window = native.SHARED_WINDOW, native.LOCAL_WINDOW
        self.rows: list[tuple] = []
        self.operands: list[int] = []
        self.constants: dict[tuple[int, int], int] = {}
        self.registers: dict[tuple[int, str], tuple[int, str]] = {}
        self.register_bytes, self.local_bytes = SINK_BYTES, 0
        self.predicate_slot, self.predicates_left = 0, 0
        self.special_registers: dict[int, int] = {}
        self.locals: dict[int, int] = {}
        self.opcode_text: list[str] = []
        self.flops: dict[int, int] = {}  # by instruction: a warp's
        self.carry: int | None = None

        entry = module.functions.get(name)
        if entry is None or not entry.is_entry:
            kernels = [key for key, function in module.functions.items() if function.is_entry]
            raise PtxError(f"no kernel named {name}; have {kernels}")
        self.entry = entry
        self._layout_params()
        self._layout_shared()
        self._decode_all()
        self._build(native)

    # ---- layout ----------------------------------------------------------------------------------------------
    def _layout_params(self) -> None:
        self.param_offset: dict[str, int] = {}
        offset = 0
        for param in self.entry.params:
            offset = align_up(offset, param.align)
            self.param_offset[param.name] = offset
            offset += param.size
        self.param_bytes = offset

    def function(self, name: str) -> Function | None:
        return self.module.functions.get(self.module.aliases.get(name, name))

    def _reachable(self) -> list[Function]:
        seen: list[Function] = []
        todo = [self.entry.name]
        while todo:
            function = self.function(todo.pop())
            if function is None or not function.has_body or function in seen:
                continue
            seen.append(function)
            for statement in function.statements:
                if statement.text.startswith("call"):
                    todo += [w for w in re.findall(r"[\w$]+", statement.text) if w in self.module.functions]
        return seen

    def _layout_shared(self) -> None:
        """Static variables first, as they come; dynamic shared memory behind them."""
        functions = self._reachable()
        words: set[str] = set()
        for function in functions:
            for statement in function.statements:
                words.update(re.findall(r"[A-Za-z_$][\w$]*", statement.text))
        variables = [v for v in self.module.variables if v.space == "shared" and v.name in words]
        for function in functions:
            variables += [v for v in function.variables if v.space == "shared"]
        self.shared_offset: dict[int, int] = {}
        dynamic = [v for v in variables if v.extern or v.size == 0]
        offset = 0
        for variable in variables:
            if variable not in dynamic:
                offset = align_up(offset, variable.align)
                self.shared_offset[id(variable)] = offset
                offset += variable.size
        self.static_shared = offset
        self.dynamic_base = align_up(offset, max([v.align for v in dynamic] + [16]))
        self.has_dynamic_shared = bool(dynamic)
        for variable in dynamic:
            self.shared_offset[id(variable)] = self.dynamic_base
        self.module_shared = {v.name: v for v in variables}

    def shared_bytes(self, dynamic: int) -> int:
        """What a block uses in all."""
        total = self.dynamic_base + dynamic if dynamic or self.has_dynamic_shared else self.static_shared
        return align_up(total, 16)

    def local_offset(self, variable: Variable) -> int:
        if id(variable) not in self.locals:
            offset = align_up(self.local_bytes, max(variable.align, 1))
            self.locals[id(variable)] = offset
            self.local_bytes = offset + max(variable.size, 1)
        return self.locals[id(variable)]

    # ---- operands --------------------------------------------------------------------------------------------
    def fail(self, message: str) -> NoReturn:
        raise PtxError(f"PTX line {self.statement.line}: {message}: {self.statement.text[:160]}")

    def constant(self, narrow: int, wide: int) -> int:
        """An operand with one value in 32-bit and one in 64-bit use."""
        key = (narrow & 0xFFFFFFFF, wide & 0xFFFFFFFFFFFFFFFF)
        return -self.constants.setdefault(key, len(self.constants)) - 1

    def immediate(self, value: int) -> int:
        return self.constant(value, value)

    def float_constant(self, value: float) -> int:
        return self.constant(_double_to_float_bits(value), _float_bits(value, "<d"))

    def new_register(self, type: str) -> int:
        if type == "pred":  # a word each, 32 to a cache line pair
            if not self.predicates_left:
                self.predicate_slot, self.predicates_left = self.register_bytes, 32
                self.register_bytes += 128
            offset = self.predicate_slot
            self.predicate_slot += 4
            self.predicates_left -= 1
            return offset | PREDICATE
        offset, size = self.register_bytes, TYPE_SIZE[type]
        self.register_bytes += 512 if size == 16 else 256 if size == 8 else 128
        return offset | (REG64 if size >= 8 else REG32)

    def register(self, name: str) -> tuple[int, str] | None:
        """The operand and type of a declared register."""
        for scope in self.statement.scope.chain():
            known = self.registers.get((id(scope), name))
            if known is not None:
                return known
            type = scope.registers.get(name) or self._numbered(scope, name)
            if type is not None:
                known = self.registers[id(scope), name] = (self.new_register(type), type)
                return known
        return None

    @staticmethod
    def _numbered(scope: Scope, name: str) -> str | None:
        for k in range(len(name) - 1, 0, -1):
            if not name[k].isdigit():
                return None
            prefix = scope.ranges.get(name[:k])
            if prefix is not None and int(name[k:]) < prefix[1]:
                return prefix[0]
        return None

    def symbol(self, name: str) -> tuple[str, int] | None:
        """The space and address of a variable."""
        for scope in self.statement.scope.chain():
            variable = scope.variables.get(name)
            if variable is not None:
                if variable.space == "shared":
                    return "shared", self.shared_offset[id(variable)]
                if variable.space in ("local", "param"):
                    return "local", self.local_offset(variable)
                return variable.space, self.symbols[name]
        if name in self.function_params:
            return self.function_params[name]
        if name in self.module_shared:
            return "shared", self.shared_offset[id(self.module_shared[name])]
        if name in self.symbols:
            return "global", self.symbols[name]
        return None

    def _is_parameter(self, name: str) -> bool:
        for scope in self.statement.scope.chain():
            if name in scope.variables:
                return scope.variables[name].space == "param"
        return name in self.function_params

    def operand(self, text: str, type: str = "b32") -> int:
        """A register, special register, constant or address of a variable."""
        text = text.strip()
        negated = text.startswith("!")
        text = text[1:].strip() if negated else text
        if text == "_":
            return PREDICATE if type == "pred" else REG64 if TYPE_SIZE.get(type, 4) == 8 else REG32
        if text == "%pt":
            return self.immediate(1)
        if text == "WARP_SZ":
            return self.immediate(32)
        register = self.register(text)
        if register is not None:
            return register[0] | 1 if negated else register[0]
        if text in isa.SPECIAL_REGISTERS:
            number = isa.SPECIAL_REGISTERS[text]
            if number not in self.special_registers:
                self.special_registers[number] = self.new_register("b32")
            return self.special_registers[number]
        if text.startswith(("%envreg", "%reserved_smem")):
            return self.immediate(0)
        literal = self._literal(text, type)
        if literal is not None:
            return literal
        match = _SYMBOL.fullmatch(text)
        symbol = self.symbol(match[1]) if match else None
        if match is None or symbol is None:
            self.fail(f"unknown operand {text!r}")
        space, address = symbol
        address += int((match[2] or "0").replace(" ", ""))
        generic = space == "local" and self._is_parameter(match[1])
        return self.immediate(address + (self.local_window if generic else 0))

    def _literal(self, text: str, type: str) -> int | None:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            bits = int(text[2:], 16)
            value = struct.unpack("<f", struct.pack("<I", bits))[0]
            return self.constant(bits, _float_bits(value, "<d") if type == "f64" else bits)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            bits = int(text[2:], 16)
            value = struct.unpack("<d", struct.pack("<Q", bits))[0]
            return self.constant(_double_to_float_bits(value) if type == "f32" else bits, bits)
        if _INTEGER.fullmatch(text):
            number = parse_int(text)
            return self.float_constant(number) if type in ("f32", "f64") else self.immediate(number)
        if _DECIMAL.fullmatch(text):
            return self.float_constant(float(text))
        return None

    def address(self, text: str) -> tuple[int, int, str | None]:
        """`[base+offset]`: the operand, the offset, and the space if the base is a variable."""
        inside = re.fullmatch(r"\[\s*(.*?)\s*\]", text.strip())
        if not inside:
            self.fail(f"expected an address, got {text!r}")
        match = _ADDRESS.fullmatch(inside[1])
        if not match:
            self.fail(f"cannot parse the address {text!r}")
        offset = parse_int(match[2].replace(" ", "")) if match[2] else 0
        register = self.register(match[1])
        if register is not None:
            return register[0], offset, None
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", match[1]):
            return self.immediate(parse_int(match[1])), offset, None
        symbol = self.symbol(match[1])
        if symbol is None:
            self.fail(f"unknown symbol {match[1]!r}")
        space, address = symbol
        return self.immediate(address + (self.local_window if space == "local" else 0)), offset, space

    def vector(self, text: str, type: str = "b32") -> list[int]:
        """`{a, b}` or a single operand."""
        text = text.strip()
        parts = split_top(text[1:-1]) if text.startswith("{") else [text]
        return [self.operand(part, type) for part in parts]

    # ---- emission --------------------------------------------------------------------------------------------
    def emit(
        self,
        op: str,
        dst: Sequence[int] = (),
        src: Sequence[int] = (),
        type: str = "b32",
        type2: str = "b32",
        flags: Iterable[str] = (),
        compare: int = 0,
        bool_op: int = 0,
        rounding: int = 0,
        space: int = 0,
        aux: int = 0,
        imm: int = 0,
        imm2: int = 0,
        vec: int = 0,
        target: int = -1,
    ) -> int:
        """Appends an instruction; returns its number."""
        guard, negated = -1, 0
        if self.statement.guard:
            negated = int(self.statement.guard.startswith("!"))
            register = self.register(self.statement.guard.lstrip("!"))
            if register is None:
                self.fail(f"unknown predicate {self.statement.guard}")
            guard = register[0] & ~3
        if type not in self.types or type2 not in self.types:
            self.fail(f"unsupported type .{type}/.{type2}")
        mods = 0
        for value, shift in zip((compare, bool_op, rounding, space), self.shifts, strict=True):
            mods |= value << shift
        for flag in flags:
            mods |= self.modifiers[flag]
        types = (self.types[type], self.types[type2])
        operands = (guard, negated, len(dst), len(src), vec, target, self.statement.line, len(self.operands))
        self.rows.append((self.opcodes[op], *types, *operands, aux, mods, _as_signed(imm), _as_signed(imm2)))
        self.operands += [*dst, *src]
        self.opcode_text.append(self.statement.text.split(None, 1)[0].rstrip(";"))
        return len(self.rows) - 1

    def patch(self, row: int, **fields: int) -> None:
        names = core().INSTRUCTION.names
        values = list(self.rows[row])
        for name, value in fields.items():
            values[names.index(name)] = value
        self.rows[row] = tuple(values)

    def branch_to(self, label: str) -> None:
        """The instruction emitted last jumps to `label`."""
        self.branches.append((len(self.rows) - 1, None, label, self.statement))

    def branch_table(self, labels: list[str]) -> None:
        first = self.rows[-1][10] + 1  # behind the index
        for i, label in enumerate(labels):
            self.branches.append((len(self.rows) - 1, first + i, label, self.statement))

    def call(self, name: str) -> None:
        self.calls.append((self.emit("Call"), name))
        self.queue.append(name)

    def carry_register(self) -> int:
        if self.carry is None:
            self.carry = self.new_register("pred")
        return self.carry

    # ---- decoding --------------------------------------------------------------------------------------------
    def _decode_all(self) -> None:
        self.queue, self.calls = [self.entry.name], []
        start: dict[str, int] = {}
        while self.queue:
            name = self.queue.pop(0)
            if name not in start:
                start[name] = len(self.rows)
                self._decode_function(self.module.functions[name])
        for row, name in self.calls:
            self.patch(row, target=start[name])

    def _decode_function(self, function: Function) -> None:
        if function.is_entry:
            self.function_params = {
                p.name: ("param", self.param_base + self.param_offset[p.name]) for p in function.params
            }
        else:
            parameters = function.params + function.returns
            self.function_params = {p.name: ("local", self.local_offset(p)) for p in parameters}
        self.carry = None
        self.branches: list[tuple[int, int | None, str, Statement]] = []
        first_row = []
        for statement in function.statements:
            first_row.append(len(self.rows))
            self.statement = statement
            self._decode_statement(statement)
        first_row.append(len(self.rows))
        last_line = function.statements[-1].line if function.statements else function.line
        self.statement = Statement(last_line, "ret", "", function.scope)
        self.emit("Ret")  # falling off the end
        for row, slot, label, statement in self.branches:
            target = self._label(statement, label, first_row)
            if slot is None:
                self.patch(row, target=target)
            else:
                self.operands[slot] = target

    def _label(self, statement: Statement, label: str, first_row: list[int]) -> int:
        for scope in statement.scope.chain():
            if label in scope.labels:
                return first_row[scope.labels[label]]
        self.statement = statement
        return self.fail(f"unknown label {label}")

    def _decode_statement(self, statement: Statement) -> None:
        match = re.match(r"([a-z_][\w.:]*)\s*(.*)", statement.text)
        if not match:
            self.fail("cannot parse the statement")
        opcode = Opcode(match[1], split_top(match[2]), self.fail)
        handler = HANDLERS.get(opcode.name)
        if handler is None:
            self.fail(f"unknown instruction '{match[1]}'")
        opcode.check_operands()
        try:
            handler(self, opcode)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            self.fail(f"cannot decode ({type(error).__name__}: {error})")
        opcode.finish()

    def _build(self, native) -> None:
        self.local_bytes = align_up(self.local_bytes, 16)
        self.instructions = np.array(self.rows, native.INSTRUCTION)
        constants = np.array(list(self.constants) or [(0, 0)], np.uint64)
        special = [(which, code & ~3) for which, code in self.special_registers.items()]
        self.machine = native.Machine(
            self.instructions,
            np.array(self.operands or [0], np.int32),
            constants.reshape(-1),
            self.register_bytes,
            self.local_bytes,
            special,
            0,
        )
        unknown = self.machine.first_unknown()
        if unknown >= 0:
            line = int(self.instructions["line"][unknown])
            raise PtxError(f"PTX line {line}: unknown instruction form '{self.opcode_text[unknown]}'")
