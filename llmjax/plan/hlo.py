"""Read the text of a compiled program (XLA's HLO): computations, instructions, and how often a step executes each.

The text is that of `Compiled.as_text()` and of XLA's dump. Loops count with their number of iterations, which the
compiler writes for some loops (`known_trip_count`); for the others it follows from the loop's counter, or the
name of its scope tells it (`parallel.fixed_tree.hidden_loop`).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import re

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
}  # fmt: skip
ASYNC_START = "AsyncCollectiveStart"  # custom call that ends the fusion in which a collective starts
HOST_SPACE = 5  # memory space of the host in a layout: S(5)

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLEE = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_CALLEES = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_PASS_THROUGH = ("bitcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier", "reshape")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
}


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, dimensions and memory space (0: the device's main memory) of an array in the program."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of its layout."""
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    arrays      its result; the leaves of a tuple in order
    operands    names of instructions
    literal     the text in the parentheses: a constant's value, a parameter's number
    attributes  the text after the operands
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    computation: str

    @functools.cached_property
    def callees(self) -> dict[str, list[str]]:
        """Attribute -> the computations that it names."""
        found: dict[str, list[str]] = {}
        for attribute, name in _CALLEE.findall(self.attributes):
            found.setdefault(attribute, []).append(name)
        for attribute, names in _CALLEES.findall(self.attributes):
            found.setdefault(attribute, []).extend(_NAME.findall(names))
        return found

    @property
    def channel(self) -> str:
        """The number that the instructions of one collective share; "" without one."""
        return self.attribute(r"channel_id=(\d+)")

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced function; "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression in the attributes; "" without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class _LoopState:
    """The values of a loop's carried tuple before an iteration: element index -> scalar, None where unknown."""

    element: Callable[[int], int | None]


class Module:
    """A parsed program.

    computations   name -> its instructions in order of execution, the last of which need not be the root
    roots          name of a computation -> its root
    unknown_loops  loops whose number of iterations depends on data; they count as one iteration
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.instructions: dict[str, Instruction] = {}
        self.unknown_loops: list[str] = []
        self._trips: dict[str, int] = {}
        self._callers: dict[str, Instruction] = {}
        self.entry = ""
        for computation, is_root, source in self._statements(text):
            instruction = _parse(source, computation)
            self.computations[computation].append(instruction)
            self.instructions[instruction.name] = instruction
            if is_root:
                self.roots[computation] = instruction
            for names in instruction.callees.values():
                for name in names:
                    self._callers.setdefault(name, instruction)
        if not self.entry:
            raise ValueError("the text is not an HLO module: it has no ENTRY computation")

    def _statements(self, text: str) -> Iterator[tuple[str, bool, str]]:
        """(computation, is root, text) of each instruction. A statement may go on in the next lines."""
        computation, pending, is_root = "", "", False
        for line in text.splitlines():
            if match := _START.match(line):
                if pending:
                    yield computation, is_root, pending
                pending, is_root = line, bool(match[1])
            elif line == "}" or line.startswith("}, execution_thread"):
                if pending:
                    yield computation, is_root, pending
                pending = ""
            elif pending:
                pending += line
            elif match := _HEADER.match(line):
                computation = match[2]
                self.computations[computation] = []
                if match[1]:
                    self.entry = computation

    @functools.cached_property
    def targets(self) -> dict[str, set[str]]:
        """Computation -> the targets of its custom calls."""
        return {
            name: {i.attribute(r'custom_call_target="([^"]*)"') for i in body if i.opcode == "custom-call"}
            for name, body in self.computations.items()
        }

    @functools.cached_property
    def started_channels(self) -> set[str]:
        """Channels of the collectives that start in one fusion, run beside others and end in another."""
        starting = [name for name, targets in self.targets.items() if ASYNC_START in targets]
        return {i.channel for name in starting for i in self.computations[name] if i.channel}

    @functools.cached_property
    def executions(self) -> dict[str, float]:
        """Computation -> how often one execution of the program executes it. Branches share one execution equally."""
        order: list[str] = []
        visited: set[str] = set()

        def visit(name: str) -> None:
            visited.add(name)
            for instruction in self.computations[name]:
                for callee in {callee for names in instruction.callees.values() for callee in names} - visited:
                    if callee in self.computations:
                        visit(callee)
            order.append(name)

        visit(self.entry)
        counts = dict.fromkeys(order, 0.0)
        counts[self.entry] = 1.0
        for name in reversed(order):
            for instruction in self.computations[name]:
                for callee, times in self.calls(instruction):
                    if callee in counts:
                        counts[callee] += counts[name] * times
        return counts

    def calls(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
        """The computations that an instruction executes, and how often."""
        callees = instruction.callees
        if instruction.opcode == "while":
            trips = self.trip_count(instruction)
            yield from ((name, trips) for name in callees["body"])
        elif instruction.opcode == "conditional":
            branches = [name for names in callees.values() for name in names]
            yield from ((name, 1 / len(branches)) for name in branches)
        elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
            yield from ((name, 1.0) for names in callees.values() for name in names)

    def executed(self) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs, inside fusions too, with its executions."""
        for name, times in self.executions.items():
            if times:
                yield from ((instruction, times) for instruction in self.computations[name])

    def operand(self, instruction: Instruction, index: int) -> Array:
        """The array that an operand is. Raises IndexError where it is an empty tuple."""
        return self.instructions[instruction.operands[index]].arrays[0]

    def operand_arrays(self, instruction: Instruction) -> list[Array]:
        """The arrays of all operands, tuples as their leaves."""
        return [array for name in instruction.operands for array in self.instructions[name].arrays]

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`: as written, or from the counter; 1 where it depends on data."""
        if loop.name not in self._trips:
            self._trips[loop.name] = self._count_trips(loop)
        return self._trips[loop.name]

    def _count_trips(self, loop: Instruction) -> int:
        if written := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(written)
        if named := loop.attribute(r'op_name="[^"]*\btrips_(\d+)/while"'):  # parallel.fixed_tree.hidden_loop
            return int(named)
        (condition,), (body,) = loop.callees["condition"], loop.callees["body"]
        first = _LoopState(functools.cache(lambda index: self._element(loop.operands[0], index, {})))
        body_env = {self._parameter(body, 0): first}
        second = _LoopState(functools.cache(lambda index: self._element(self.roots[body].name, index, body_env)))
        comparisons = [
            self._comparison(self.roots[condition].name, {self._parameter(condition, 0): state})
            for state in (first, second)
        ]
        trips = _count_iterations(*comparisons)
        if trips is None:
            self.unknown_loops.append(loop.name)
            return 1
        return trips

    def origin(self, name: str) -> Instruction:
        """The instruction that makes a value, seen through copies, tuples and loops that leave it unchanged."""
        for _ in range(100):
            if (source := self._source(self.instructions[name])) is None:
                break
            name = source
        return self.instructions[name]

    def _source(self, instruction: Instruction) -> str | None:
        if instruction.opcode in _PASS_THROUGH:
            return instruction.operands[0]
        if instruction.opcode == "get-tuple-element":
            return self._element_source(instruction.operands[0], int(instruction.attribute(r"index=(\d+)")))
        caller = self._callers.get(instruction.computation)
        if instruction.opcode == "parameter" and caller and caller.opcode in ("fusion", "call", "async-start"):
            return caller.operands[int(instruction.literal)]
        return None

    def _element_source(self, name: str, index: int) -> str | None:
        """The instruction that makes an element of a tuple, if the element passes loops unchanged."""
        instruction = self.instructions[name]
        if instruction.opcode == "tuple":
            return instruction.operands[index]
        if instruction.opcode in _PASS_THROUGH:
            return self._element_source(instruction.operands[0], index)
        loop = instruction
        if instruction.opcode == "parameter":
            loop = self._callers.get(instruction.computation, instruction)
        if loop.opcode == "while" and self._is_invariant(loop, index):
            return self._element_source(loop.operands[0], index)
        return None

    def _is_invariant(self, loop: Instruction, index: int) -> bool:
        root = self.roots[loop.callees["body"][0]]
        if root.opcode != "tuple":
            return False
        element = self.instructions[root.operands[index]]
        while element.opcode in _PASS_THROUGH:
            element = self.instructions[element.operands[0]]
        return element.opcode == "get-tuple-element" and element.attribute(r"index=(\d+)") == str(index)

    def _parameter(self, computation: str, number: int) -> str:
        return next(
            i.name for i in self.computations[computation] if i.opcode == "parameter" and i.literal == str(number)
        )

    def _comparison(self, name: str, env: dict) -> tuple[str, int | None, int | None]:
        """(direction, left, right) of the comparison that ends a loop's condition."""
        instruction = self.instructions[name]
        if instruction.opcode in ("fusion", "call"):
            callee, inner = self._enter(instruction, env)
            return self._comparison(self.roots[callee].name, inner)
        if instruction.opcode in _PASS_THROUGH:
            return self._comparison(instruction.operands[0], env)
        if instruction.opcode != "compare":
            return "", None, None
        left, right = (self._scalar(operand, env) for operand in instruction.operands)
        return instruction.attribute(r"direction=(\w+)"), left, right

    def _enter(self, call: Instruction, env: dict) -> tuple[str, dict]:
        """The computation that an instruction calls, and the scalars that its parameters have."""
        (callee,) = (name for names in call.callees.values() for name in names)
        values = [self._scalar(operand, env) for operand in call.operands]
        return callee, {self._parameter(callee, number): value for number, value in enumerate(values)}

    def _scalar(self, name: str, env: dict) -> int | None:
        """The value of an integer scalar; None if it is none or depends on data. `env`: values of parameters."""
        instruction = self.instructions[name]
        if instruction.arrays and instruction.arrays[0].dims:
            return None
        if name in env:
            return env[name] if isinstance(env[name], int) else None
        if instruction.opcode == "constant":
            return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
        if instruction.opcode == "get-tuple-element":
            return self._element(instruction.operands[0], int(instruction.attribute(r"index=(\d+)")), env)
        if instruction.opcode in _PASS_THROUGH:
            return self._scalar(instruction.operands[0], env)
        if instruction.opcode in ("fusion", "call"):
            callee, inner = self._enter(instruction, env)
            return self._scalar(self.roots[callee].name, inner)
        if operation := _ARITHMETIC.get(instruction.opcode):
            left, right = (self._scalar(operand, env) for operand in instruction.operands)
            return None if left is None or right is None else operation(left, right)
        return None

    def _element(self, name: str, index: int, env: dict) -> int | None:
        """The value of a scalar in a tuple."""
        if isinstance(state := env.get(name), _LoopState):
            return state.element(index)
        if self.instructions[name].opcode == "tuple":
            return self._scalar(self.instructions[name].operands[index], env)
        source = self._element_source(name, index)
        return None if source is None else self._scalar(source, {})


def _parse(source: str, computation: str) -> Instruction:
    source = re.sub(r"/\*.*?\*/", "", source)
    match = _START.match(source)
    assert match is not None
    rest = source[match.end() :]
    shape_end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opening = rest.index("(")
    closing = _matching(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    return Instruction(
        name=match[2],
        opcode=opcode,
        arrays=tuple(_arrays(shape)),
        operands=() if opcode == "constant" else tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[closing + 1 :],
        computation=computation,
    )


def _matching(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Array(dtype, sizes, int(space[1]) if space else 0)


def _count_iterations(first: tuple, second: tuple) -> int | None:
    """Iterations of a loop from the comparison of its condition, before the first and before the second iteration."""
    direction, left, right = first
    if None in (left, right, second[1], second[2]):
        return None
    gap, step = left - right, (second[1] - second[2]) - (left - right)
    if direction in ("GT", "GE"):
        gap, step, direction = -gap, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        return -gap // step if step and gap % step == 0 and -gap // step >= 0 else None
    if direction not in ("LT", "LE") or (step <= 0 and gap <= 0):
        return None
    last = 0 if direction == "LE" else -1
    return 0 if gap > last else (last - gap) // step + 1
