"""PTX text to variables and functions, the latter as lists of statements with their scopes."""

from __future__ import annotations

import bisect
import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import PtxError

TYPE_SIZE = {
    **dict.fromkeys(["b8", "u8", "s8"], 1),
    **dict.fromkeys(["b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2"], 2),
    **dict.fromkeys(["b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32", "pred", "u16x2", "s16x2"], 4),
    **dict.fromkeys(["b64", "u64", "s64", "f64", "f32x2"], 8),
    "b128": 16,
}
SPACES = ("global", "const", "shared", "local", "param")
IGNORED_QUALIFIERS = {"visible", "weak", "common", "managed", "unified", "ptr", "extern"}
OPAQUE_TYPES = {"texref", "samplerref", "surfref"}


@dataclass
class Variable:
    name: str
    space: str
    type: str
    size: int
    align: int
    line: int
    initial: bytes = b""
    addresses: list[tuple[int, str, int]] = field(default_factory=list)  # initialisers: (offset, symbol, addend)
    extern: bool = False


class Scope:
    """A block of a function: its registers, labels and variables."""

    def __init__(self, parent: Scope | None = None):
        self.parent = parent
        self.registers: dict[str, str] = {}
        self.ranges: dict[str, tuple[str, int]] = {}  # %r<10>: type and number
        self.labels: dict[str, int] = {}
        self.variables: dict[str, Variable] = {}
        self.branch_tables: dict[str, list[str]] = {}

    def chain(self) -> Iterator[Scope]:
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


@dataclass
class Statement:
    line: int
    text: str  # without the guard
    guard: str  # "", "%p1" or "!%p1"
    scope: Scope


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list[Variable]
    returns: list[Variable]
    line: int
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scope: Scope = field(default_factory=Scope)
    statements: list[Statement] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    has_body: bool = True


@dataclass
class Module:
    version: str = ""
    target: str = ""
    variables: list[Variable] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def parse_int(text: str) -> int:
    text = text.strip().rstrip("U")
    return int(text, 8) if re.fullmatch(r"[-+]?0[0-7]+", text) else int(text, 0)


def split_top(text: str, separator: str = ",") -> list[str]:
    """Splits at separators that are not inside brackets or quotes; empty parts at the end are dropped."""
    parts, depth, current, quoted = [], 0, "", False
    for char in text:
        quoted ^= char == '"'
        if not quoted:
            depth += char in "{[(<"
            depth -= char in "}])>"
            if char == separator and depth == 0:
                parts.append(current.strip())
                current = ""
                continue
        current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def _strip(text: str) -> str:
    """Blanks out comments and debug information, and keeps the line numbers."""

    def newlines(match: re.Match) -> str:
        return "\n" * match.group(0).count("\n")

    text = re.sub(r"/\*.*?\*/", newlines, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^[ \t]*(\.loc|\.file|@@DWARF)\b[^\n]*", "", text)
    return re.sub(r"\.section\s+[\w.$]+\s*\{[^}]*\}", newlines, text)


_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_HEX_FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]+)")
_DECIMAL = re.compile(r"[-+0-9.eE]+")
_ADDRESS = re.compile(r"(?:generic\s*\(\s*)?([\w$]+)\s*\)?\s*(?:\+\s*(\d+))?")


def _initialise(variable: Variable, text: str) -> None:
    size = TYPE_SIZE.get(variable.type, 8)
    data = bytearray()
    for item in split_top(text.replace("{", " ").replace("}", " ")):
        if not item:
            continue
        if match := _HEX_FLOAT.fullmatch(item):
            data += int(match[1], 16).to_bytes(size, "little")
        elif _INTEGER.fullmatch(item):
            data += (parse_int(item) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif _DECIMAL.fullmatch(item):
            data += struct.pack("<f" if variable.type == "f32" else "<d", float(item))
        elif match := _ADDRESS.match(item):
            variable.addresses.append((len(data), match[1], int(match[2] or 0)))
            data += bytes(size)
        else:
            raise PtxError(f"line {variable.line}: cannot parse the initialiser {item!r}")
    variable.initial = bytes(data)
    variable.size = max(variable.size, len(data))


def parse_variables(text: str, line: int) -> list[Variable]:
    """A declaration of one or several variables of one type."""
    declaration, _, initial = text.partition("=")
    tokens = declaration.replace(",", " , ").split()
    space = element = None
    align, vector, extern, i = 0, 1, False, 0
    while i < len(tokens) and tokens[i].startswith("."):
        token = tokens[i][1:]
        if token == "align":
            align = int(tokens[i + 1])
            i += 1
        elif token.split("::")[0] in SPACES:
            space = space or token.split("::")[0]
        elif token in ("v2", "v4", "v8"):
            vector = int(token[1:])
        elif token in TYPE_SIZE or token in OPAQUE_TYPES:
            element = token
        elif token not in IGNORED_QUALIFIERS and not token.startswith("attribute"):
            raise PtxError(f"line {line}: cannot parse the declaration: {text[:100]}")
        extern |= token == "extern"
        i += 1
    element = element or "b8"
    element_size = TYPE_SIZE.get(element, 8) * vector
    variables = []
    for name in split_top(" ".join(tokens[i:])):
        match = re.fullmatch(r"([\w$.%]+)((?:\[[^\]]*\])*)", name.replace(" ", ""))
        if not match or space is None:
            raise PtxError(f"line {line}: cannot parse the declaration: {text[:100]}")
        dimensions = re.findall(r"\[([^\]]*)\]", match[2])
        count = 1
        for dimension in dimensions:
            count *= parse_int(dimension) if dimension else 0
        variable = Variable(match[1], space, element, element_size * count, align or min(element_size, 16), line)
        variable.extern = extern
        if initial.strip():
            _initialise(variable, initial.strip())
        variables.append(variable)
    return variables


_SPACE = re.compile(r"\s*")
_HEADER = re.compile(r"\.(version|target|address_size)\s+([^\n]*)")
_FUNCTION = re.compile(
    r"\s*(?P<linkage>.*?)\.(?P<kind>entry|func)\b\s*(?:\.noreturn|\.attribute\([^)]*\))?\s*(?:\((?P<returns>[^)]*)\))?"
    r"\s*(?P<name>[\w$]+)\s*(?:\((?P<params>(?:[^()]|\([^)]*\))*)\))?(?P<directives>.*)",
    re.S,
)
_DIRECTIVE = re.compile(
    r"\.(reqntid|maxntid|minnctapersm|maxnreg|reqnctapercluster|maxclusterrank|explicitcluster)\b\s*([\d, ]*)"
)
_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_TABLE = re.compile(r"\s*\.(branchtargets|calltargets)\b([^;]*);")
_PROTOTYPE = re.compile(r"\s*\.callprototype\b[^;]*;")
_GUARD = re.compile(r"@\s*(!?)\s*([\w%$]+)\s*")
_REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+(.*)")
_RANGE = re.compile(r"([\w%$]+)<(\d+)>")


class _Parser:
    def __init__(self, text: str):
        self.text = _strip(text)
        self.position = 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        self.module = Module()

    def line(self) -> int:
        return bisect.bisect_right(self.starts, self.position)

    def skip_space(self) -> bool:
        """False at the end of the text."""
        self.position = _SPACE.match(self.text, self.position).end()
        return self.position < len(self.text)

    def until(self, char: str, what: str) -> str:
        end = self.text.find(char, self.position)
        if end < 0:
            raise PtxError(f"line {self.line()}: {what} does not end: {self.text[self.position :][:60]!r}")
        found = self.text[self.position : end]
        self.position = end + 1
        return found

    def parse(self) -> Module:
        while self.skip_space():
            if match := _HEADER.match(self.text, self.position):
                if match[1] == "version":
                    self.module.version = match[2].strip()
                elif match[1] == "target":
                    self.module.target = match[2].strip()
                self.position = match.end()
                continue
            head = re.compile(r"[^;{=]*").match(self.text, self.position).group(0)
            if re.search(r"\.(entry|func)\b", head):
                self.function()
            elif head.strip().startswith(".section"):
                self.until("}", "a section")
            else:
                line = self.line()
                self.statement(self.until(";", "a statement").strip(), line)
        if not self.module.version or not self.module.target:
            raise PtxError("this is not a PTX module: it has no .version and .target")
        return self.module

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".alias"):
            alias, target = (x.strip() for x in text[6:].split(","))
            self.module.aliases[alias] = target
        elif text and not text.startswith((".pragma", ".b")):
            self.module.variables += parse_variables(text, line)

    def parameters(self, text: str | None, line: int) -> list[Variable]:
        variables = []
        for declaration in split_top(text or ""):
            plain = re.sub(r"\.ptr\s*(\.(global|shared|const|local|param))?\s*(\.align\s+\d+)?", "", declaration)
            if plain.startswith(".reg"):
                raise PtxError(f"line {line}: .reg function parameters are not supported")
            variables += parse_variables(plain, line)
        return variables

    def function(self) -> None:
        line, start, depth = self.line(), self.position, 0
        while self.position < len(self.text):
            char = self.text[self.position]
            depth += (char == "(") - (char == ")")
            if depth == 0 and char in "{;":
                break
            self.position += 1
        else:
            raise PtxError(f"line {line}: a function header does not end")
        match = _FUNCTION.fullmatch(self.text[start : self.position])
        if not match:
            raise PtxError(f"line {line}: cannot parse the function header {self.text[start:][:80]!r}")
        function = Function(
            match["name"],
            match["kind"] == "entry",
            self.parameters(match["params"], line),
            self.parameters(match["returns"], line),
            line,
        )
        for name, numbers in _DIRECTIVE.findall(match["directives"]):
            function.directives[name] = tuple(int(n) for n in numbers.replace(" ", "").split(",") if n)
        self.position += 1
        if char == ";":
            function.has_body = False
            self.module.functions.setdefault(function.name, function)
            return
        self.body(function)
        self.module.functions[function.name] = function

    def body(self, function: Function) -> None:
        scope = function.scope
        while True:
            if not self.skip_space():
                raise PtxError(f"line {function.line}: the body of {function.name} does not end")
            char = self.text[self.position]
            if char in "{};":
                self.position += 1
                if char == "{":
                    scope = Scope(scope)
                elif char == "}":
                    if scope is function.scope:
                        return
                    scope = scope.parent
                continue
            if match := _LABEL.match(self.text, self.position):
                self.label(match, scope, len(function.statements))
                continue
            line = self.line()
            text = " ".join(self.until(";", "a statement").split())
            if text.startswith(".reg"):
                self.registers(text, line, scope)
            elif text.startswith("."):
                if not text.startswith(".pragma"):
                    for variable in parse_variables(text, line):
                        scope.variables[variable.name] = variable
                        function.variables.append(variable)
            else:
                guard = ""
                if match := _GUARD.match(text):
                    guard = match[1] + match[2]
                    text = text[match.end() :]
                function.statements.append(Statement(line, text, guard, scope))

    def label(self, match: re.Match, scope: Scope, index: int) -> None:
        scope.labels[match[1]] = index
        self.position = match.end()
        if table := _TABLE.match(self.text, self.position):
            scope.branch_tables[match[1]] = [name.strip() for name in table[2].split(",")]
            self.position = table.end()
        if prototype := _PROTOTYPE.match(self.text, self.position):
            self.position = prototype.end()

    def registers(self, text: str, line: int, scope: Scope) -> None:
        match = _REGISTERS.fullmatch(text)
        if not match or match[1] not in TYPE_SIZE:
            raise PtxError(f"line {line}: unsupported register declaration: {text}")
        for name in (part.strip() for part in match[2].split(",")):
            if numbered := _RANGE.fullmatch(name):
                scope.ranges[numbered[1]] = (match[1], int(numbered[2]))
            else:
                scope.registers[name] = match[1]


@functools.lru_cache(maxsize=16)
def parse_module(text: str) -> Module:
    """Raises PtxError with a line where the text is not PTX. The result is shared: it must not be changed."""
    return _Parser(text).parse()
