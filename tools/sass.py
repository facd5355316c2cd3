"""Counts what the CUDA kernels cost, from their machine code for sm_90: a bound on their speed without a GPU.

    python tools/sass.py                    compile, disassemble, print the table
    python tools/sass.py --check            fail where a kernel is worse than benchmarks/sass.json says
    python tools/sass.py --update           write benchmarks/sass.json and the table of docs/kernel_figures.md
    python tools/sass.py --listing REGEX    print the main loops of some kernels, instruction by instruction

`--objects FOLDER` takes the folder's NAME.o for NAME.cu instead of compiling. Needs nvcc, cuobjdump and nvdisasm (of
the CUDA toolkit, or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) and c++filt.

How it counts. The instructions of a kernel form blocks and loops. A main loop is one that moves the data: that has
the loads and stores of global memory, or the matrix products. An iteration takes the path that moves most bytes in
the widest accesses, which are whole vectors, and of such paths the longest: no instruction is left out that a usual
iteration might need. How many values it handles follows from the bytes that it loads or stores. A kernel of several
loops, each of which handles all values, costs their sum. What a convolution does before its main loop is the longest
way there, each loop on it taken once; what it does with its sums is counted in the kernels of tools/conv_finish.cu,
on the longest way through, where every channel has high nibbles. Nothing here is a time: memory latency, bank
conflicts and the cache are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import build_config

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "sass.json"
DOCUMENT = ROOT / "docs" / "kernel_figures.md"
FINISH = ROOT / "tools" / "conv_finish.cu"  # kernels that are only counted
ARCHITECTURE = "sm_90"

# --- the machine: an H100 SXM, by data sheet but for the copy, which is measured ------------------------------------

MULTIPROCESSORS = 132
CLOCK = 1.75e9  # Hz, under load
LANES = 4 * 32  # issued each cycle, on a multiprocessor
ISSUE = 0.5  # share of the issue slots that a kernel can count on
COPY = 3.0e12  # bytes a second, read and written
INT8_PRODUCTS = 1979e12 / 2  # multiplications a second, dense
MMA_SHARE = 0.6  # of them that mma.sync reaches
# Units that take fewer lanes a cycle than are issued: conversions but for those of 16 bits, reciprocals, population
# counts; float64; shared memory. (Where sources differ the slower rate is taken.)
UNITS = {
    "F2F": 16,
    "F2I": 16,
    "FRND": 16,
    "I2F": 16,
    "MUFU": 16,
    "POPC": 16,
    "DADD": 64,
    "DMUL": 64,
    "DFMA": 64,
    "DSETP": 64,
    "LDS": 32,
    "STS": 32,
    "ATOMS": 32,
    "SHFL": 32,
}

# Of a multiprocessor; a block that has shared memory takes RESERVED bytes more.
REGISTERS, SHARED_BYTES, RESERVED, WARPS, BLOCKS = 65536, 228 << 10, 1 << 10, 64, 32


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """Return how many blocks fit on a multiprocessor; registers are given to warps by 256, shared memory by 128."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_BYTES // (-(-(shared + RESERVED) // 128) * 128)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


# --- what the instructions do not tell -----------------------------------------------------------------------------

SIZES = {"float": 4.0, "Half": 2.0, "BFloat16": 2.0, "unsigned char": 1.0, "signed char": 1.0}


@dataclass(frozen=True)
class Work:
    """What the kernels of a pattern work on.

    Attributes:
        pattern: matches a whole name; groups named `read`, `written` and `value` (for both) are the types of a value,
            one named `vector` is how many of them an access moves where there is no wider one for them.
        read: bytes of a value where they have no type; 0: nothing is read.
        written: the same of what is written.
        loops: how many loops handle all values, one after the other.
        rare_cases: an iteration of the main loop branches only into cases that are rare: its shortest path counts.
        finishes: an iteration finishes sums, which it loads 16 bytes at a time.
        shared: bytes of shared memory that a launch asks for, from the match of the name.
    """

    pattern: str
    read: float = 0.0
    written: float = 0.0
    loops: int = 1
    rare_cases: bool = False
    finishes: bool = False
    shared: Callable[[re.Match[str]], int] = lambda match: 0

    def bytes_of_value(self, match: re.Match[str]) -> tuple[float, float]:
        """Return the bytes of a value that are read and that are written."""
        sizes = {side: SIZES[name] for side, name in match.groupdict().items() if name in SIZES}
        both = sizes.get("value", 0.0)
        return sizes.get("read", both or self.read), sizes.get("written", both or self.written)

    def widths(self, match: re.Match[str]) -> dict[bool, int]:
        """Return the bytes of an access for values, of loads (True) and stores (False), where the name tells."""
        vector = int(match.groupdict().get("vector") or 0)
        sides = {True: match.groupdict().get("read"), False: match.groupdict().get("written")}
        return {loads: min(16, int(vector * SIZES[name])) for loads, name in sides.items() if vector and name}


def _table_shared(match: re.Match[str]) -> int:
    return 48 << 10 if match[0].endswith(("rows>", "crossing>")) else 0  # at most: quantizers of all channels


def _conv_shared(match: re.Match[str]) -> int:
    strips, warps = int(match["strips"]), int(match["warps"])
    constants = 3920  # of a strip
    stage = 32 * warps * (32 if match["packed"] == "true" else 64) + 64 * strips * 64
    return 3 * stage + strips * constants


WORK = (
    Work(r"elementwise_kernel<Each<FakeQuantize, (?P<value>\w+)>, .*>", shared=_table_shared),
    Work(r"elementwise_kernel<Each<Quantize, (?P<read>\w+)>, .*>", written=1.0, shared=_table_shared),
    Work(r"elementwise_kernel<PackGroup<(?P<read>\w+)>, .*>", written=0.5, shared=_table_shared),
    Work(r"elementwise_kernel<UnpackGroup<(?P<written>\w+)>, .*>", read=0.5, shared=_table_shared),
    # Other cases are quantizers along the samples, and packed bytes that are not aligned or end within a vector.
    Work(r"pack_tiles_kernel<(?P<read>\w+), (?P<vector>\d+)>", written=0.5, rare_cases=True),
    Work(r"unpack_tiles_kernel<(?P<written>\w+), (?P<vector>\d+)>", read=0.5, rare_cases=True),
    Work(r"pack_rows_kernel", read=1.0, written=0.5, rare_cases=True),
    Work(r"unpack_rows_kernel", read=0.5, written=1.0, rare_cases=True),
    Work(r"whole_channel_kernel<(?P<read>\w+), (?P<vector>\d+)>", loops=2),
    Work(r"(rows|columns)_kernel<(?P<read>\w+), (?P<vector>\d+), \w+, \w+>"),
    Work(r"histogram_(rows|columns)_kernel<(?P<read>\w+), (?P<vector>\d+)>", shared=lambda match: 48 << 10),
    Work(r"conv_kernel<(?P<strips>\d+), (?P<warps>\d+), \d+, (?P<packed>\w+)>", rare_cases=True, shared=_conv_shared),
    Work(r"finish_kernel<\w+, \w+, \w+>", finishes=True),
)


def work_of(kernel: str) -> tuple[Work, re.Match[str]] | None:
    """Return what a kernel works on; None if only its resources are of interest."""
    for work in WORK:
        if match := re.fullmatch(work.pattern, kernel):
            return work, match
    return None


# --- machine code --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """An instruction at its address; opcode is the whole name, such as LDG.E.128."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The name without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes of global memory that a lane moves."""
        if self.base not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            return 0
        for modifier in self.opcode.split(".")[1:]:
            if size := {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}.get(modifier):
                return size
        return 4

    @property
    def loads(self) -> bool:
        """Whether it reads global memory."""
        return self.base in ("LDG", "LDGSTS", "LD")

    @property
    def target(self) -> int | None:
        """Where it jumps to."""
        if self.base in ("BRA", "CALL") and (match := re.search(r"0x([0-9a-f]+)", self.operands)):
            return int(match[1], 16)
        return None

    @property
    def ends_block(self) -> bool:
        """Whether the next instruction begins a block."""
        return self.base in ("BRA", "EXIT", "RET", "CALL", "BRX")

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A jump with a second predicate has it in its operands."""
        if self.base == "CALL":
            return True
        conditional = bool(self.predicate) or re.match(r"!?U?P\d", self.operands) is not None
        return self.base not in ("BRA", "EXIT", "RET", "BRX") or conditional


@dataclass
class Block:
    """Instructions that follow each other without a jump."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # addresses

    @property
    def address(self) -> int:
        """The address of the first instruction."""
        return self.instructions[0].address


@dataclass
class Loop:
    """A natural loop: its header and the addresses of its blocks."""

    header: int
    blocks: set[int]
    inner: set[int] = field(default_factory=set)  # blocks of loops inside of it


@dataclass
class Code:
    """The machine code of one kernel."""

    instructions: list[Instruction]

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """The blocks by their addresses."""
        starts = {self.instructions[0].address}
        for now, after in zip(self.instructions, self.instructions[1:], strict=False):
            if now.target is not None:
                starts.add(now.target)
            if now.ends_block:
                starts.add(after.address)
        blocks: list[Block] = []
        for instruction in self.instructions:
            if instruction.address in starts:
                blocks.append(Block([]))
            blocks[-1].instructions.append(instruction)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            last = block.instructions[-1]
            if last.base == "BRA" and last.target is not None:
                block.successors.append(last.target)
            if last.falls_through and following is not None:
                block.successors.append(following.address)
        return {block.address: block for block in blocks}

    @cached_property
    def subroutines(self) -> dict[int, int]:
        """Instructions on the shortest way through each function that is called, by its address."""
        called = {i.target for i in self.instructions if i.base == "CALL" and i.target is not None}
        return {address: self._shortest_way_out(address) for address in called}

    def _shortest_way_out(self, start: int) -> int:
        costs = {start: 0}
        queue = [start]
        ways = []
        while queue:
            address = queue.pop(0)
            block = self.blocks[address]
            cost = costs[address] + len(block.instructions)
            if block.instructions[-1].base == "RET":
                ways.append(cost)
            for successor in block.successors:
                if cost < costs.get(successor, sys.maxsize):
                    costs[successor] = cost
                    queue.append(successor)
        return min(ways, default=0)

    @cached_property
    def _order(self) -> list[int]:
        """Reachable blocks in reverse postorder."""
        seen: set[int] = set()
        order: list[int] = []
        entry = self.instructions[0].address
        stack: list[tuple[int, Iterator[int]]] = [(entry, iter(self.blocks[entry].successors))]
        seen.add(entry)
        while stack:
            address, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                order.append(address)
                stack.pop()
        return order[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        """The reachable predecessors of each block."""
        before: dict[int, list[int]] = {address: [] for address in self.blocks}
        for address in self._order:
            for successor in self.blocks[address].successors:
                before[successor].append(address)
        return before

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each reachable block (Cooper, Harvey, Kennedy: A simple, fast algorithm)."""
        place = {address: i for i, address in enumerate(self._order)}
        immediate = {self._order[0]: self._order[0]}

        def meet(a: int, b: int) -> int:
            while a != b:
                if place[a] > place[b]:
                    a = immediate[a]
                else:
                    b = immediate[b]
            return a

        changed = True
        while changed:
            changed = False
            for address in self._order[1:]:
                known = [p for p in self.predecessors[address] if p in immediate]
                new = known[0]
                for other in known[1:]:
                    new = meet(new, other)
                if immediate.get(address) != new:
                    immediate[address] = new
                    changed = True
        return immediate

    def _dominates(self, a: int, b: int) -> bool:
        while b != self._order[0]:
            if a == b:
                return True
            b = self._dominators[b]
        return a == b

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops."""
        found: dict[int, Loop] = {}
        for address in self._order:
            for header in self.blocks[address].successors:
                if not self._dominates(header, address):
                    continue
                loop = found.setdefault(header, Loop(header, {header}))
                queue = [address]
                while queue:
                    block = queue.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        queue.extend(self.predecessors[block])
        for outer in found.values():
            for inner in found.values():
                if inner.header != outer.header and inner.header in outer.blocks:
                    outer.inner |= inner.blocks
        return list(found.values())

    def path(self, loop: Loop, shortest: bool, widths: Mapping[bool, int] | None = None) -> list[Instruction]:
        """Return the instructions of an iteration that moves most bytes in the widest accesses, or in `widths`."""
        own = [i for a in loop.blocks - loop.inner for i in self.blocks[a].instructions if i.bytes]
        widest = {loads: max((i.bytes for i in own if i.loads == loads), default=0) for loads in (True, False)}
        widest.update(widths or {})

        def moved(block: int) -> int:
            if block in loop.inner:
                return 0
            return sum(
                i.bytes for i in self.blocks[block].instructions if i.bytes and i.bytes == widest[i.loads]
            ) + 1000 * sum(i.base in MMA for i in self.blocks[block].instructions)

        best: dict[int, tuple[int, int, int]] = {}  # bytes, instructions or their negative, predecessor
        ends: list[tuple[int, int, int]] = []
        for address in self._order:
            if address not in loop.blocks:
                continue
            before = (0, 0, -1)
            if address != loop.header:
                candidates = [(*best[p][:2], p) for p in self.predecessors[address] if p in best]
                if not candidates:
                    continue
                before = max(candidates)
            block = self.blocks[address]
            cost = len(block.instructions) + sum(
                self.subroutines[i.target] for i in block.instructions if i.base == "CALL" and i.target is not None
            )
            best[address] = (before[0] + moved(address), before[1] + (-cost if shortest else cost), before[2])
            if loop.header in block.successors:
                ends.append((*best[address][:2], address))
        address = max(ends)[2]
        blocks: list[int] = []
        while address != -1:
            blocks.append(address)
            address = best[address][2]
        return [i for a in reversed(blocks) for i in self.blocks[a].instructions]

    def longest_way(self, start: int, ends: Iterable[int], blocks: Iterable[int]) -> list[Instruction]:
        """Return the instructions of the longest way from one block to one of others through `blocks`."""
        place = {address: i for i, address in enumerate(self._order)}
        allowed = {*blocks, *ends}
        ways = {start: (len(self.blocks[start].instructions), -1)}  # instructions, predecessor
        for address in self._order:
            if address not in ways or (address in ends and address != start):
                continue
            for successor in self.blocks[address].successors:
                length = ways[address][0] + len(self.blocks[successor].instructions)
                forward = place[successor] > place[address]
                if successor in allowed and forward and length > ways.get(successor, (0, -1))[0]:
                    ways[successor] = length, address
        address = max((end for end in ends if end in ways), key=lambda end: ways[end][0])
        way: list[int] = []
        while address != -1:
            way.append(address)
            address = ways[address][1]
        return [i for a in reversed(way) for i in self.blocks[a].instructions]

    def before(self, path: Sequence[Instruction]) -> list[Instruction]:
        """Return the instructions of the longest way to the first one of a path, each loop taken once."""
        first = path[0].address
        way = self.longest_way(self.instructions[0].address, [first], self.blocks)
        return [i for i in way if i.address not in {i.address for i in self.blocks[first].instructions}]

    def finishing(self) -> list[Instruction]:
        """Return the longest way through the loop with most loads of 16 bytes, loops inside of it left out."""

        def loads(loop: Loop) -> int:
            own = (i for a in loop.blocks - loop.inner for i in self.blocks[a].instructions)
            return sum(i.loads and i.bytes == 16 for i in own)

        loop = max(self.loops, key=loads)
        own = loop.blocks - loop.inner
        latches = [a for a in own if loop.header in self.blocks[a].successors]
        return self.longest_way(loop.header, latches, own)

    def main_loops(
        self, count: int, shortest: bool = False, widths: Mapping[bool, int] | None = None
    ) -> list[list[Instruction]]:
        """Return the paths of the `count` loops that move most: matrix products, then bytes of global memory.

        A loop around others that move at least half as much only sets them up.
        """
        ranked = []
        for loop in self.loops:
            path = self.path(loop, shortest, widths)
            inner = [i for a in loop.inner for i in self.blocks[a].instructions]
            own = [i for i in path if i.address not in {i.address for i in inner}]
            weight = (sum(i.base in MMA for i in own), sum(i.bytes for i in own), -len(loop.blocks))
            if weight[0] or weight[1] > 2 * sum(i.bytes for i in path if i in inner):
                ranked.append((weight, path))
        ranked.sort(key=lambda entry: entry[0], reverse=True)
        return [path for _, path in ranked[:count]]


MMA = ("IMMA", "HMMA", "IGMMA")


@dataclass
class Kernel:
    """A kernel of an object file."""

    name: str
    code: Code
    registers: int
    stack: int
    static_shared: int
    threads: int

    @cached_property
    def main_loops(self) -> list[list[Instruction]]:
        """The paths through the loops that do the work."""
        found = work_of(self.name)
        if found is None:
            return self.code.main_loops(1)
        work, match = found
        return self.code.main_loops(work.loops, work.rare_cases, work.widths(match))

    @cached_property
    def divisions(self) -> int:
        """64-bit divisions, each of which converts its divisor to a float."""
        return sum(i.opcode.startswith("I2F.U64") for i in self.code.instructions)

    def widths(self, loads: bool) -> str:
        """Widths of the loads or stores of global memory in the main loops, as "16" or "16 4"."""
        widths = {i.bytes for path in self.main_loops for i in path if i.bytes and i.loads == loads}
        return " ".join(map(str, sorted(widths, reverse=True)))


def _run(command: Sequence[str], **options: Any) -> str:
    result = subprocess.run(command, text=True, capture_output=True, **options)
    if result.returncode:
        raise SystemExit(f"sass: {' '.join(map(str, command[:3]))} ... failed:\n{result.stderr}")
    return str(result.stdout)


def _tool(name: str) -> str:
    """Return the path of a tool of the CUDA toolkit, from CUDA_HOME, PATH or its package."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    home = [str(Path(os.environ["CUDA_HOME"], "bin"))] if os.environ.get("CUDA_HOME") else []
    found = shutil.which(name, path=os.pathsep.join([*home, os.environ.get("PATH", ""), str(packages)]))
    if found is None:
        raise SystemExit(f"sass: {name} was not found; run `pip install nvidia-cuda-{name}`.")
    return found


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*[\w.]*)\s*(.*?)\s*;")


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function that `cuobjdump -sass` lists."""
    codes: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if "Function :" in line:
            current = codes.setdefault(line.split()[-1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return codes


def read_kernels(object_file: Path) -> list[Kernel]:
    """Return the kernels of an object file or a cubin, in the order of their names."""
    environment = {**os.environ, "PATH": f"{Path(_tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    tool = [_tool("cuobjdump"), "-arch", ARCHITECTURE]
    codes = parse(_run([*tool, "-sass", str(object_file)], env=environment))
    resources = {}
    usage = _run([*tool, "-res-usage", str(object_file)], env=environment)
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.+)", usage):
        resources[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", numbers)}
    threads = {}
    for name, section in re.findall(
        r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\S)", _run([*tool, "-elf", str(object_file)], env=environment), re.M | re.S
    ):
        limit = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x([0-9a-f]+)", section)
        threads[name] = int(limit[1], 16) if limit else 1024
    kernels = []
    for symbol, name in zip(codes, readable(codes), strict=True):
        use = resources[symbol]
        shared = max(use["SHARED"] - RESERVED, 0)  # cuobjdump includes what is reserved
        code = Code(codes[symbol])
        kernels.append(Kernel(name, code, use["REG"], use["STACK"], shared, threads.get(symbol, 1024)))
    return sorted(kernels, key=lambda kernel: kernel.name)


SOURCES = ("uniform", "periodic", "rows", "crossing")  # of csrc/cuda/elementwise.cuh; symbols have their numbers


def readable(symbols: Iterable[str]) -> list[str]:
    """Return symbols as a reader would write them: without namespaces, result and parameters."""
    names = _run(["c++filt"], input="\n".join(symbols)).splitlines()
    short = []
    for name in names:
        name = re.sub(r"(ptq4cuda::|\(anonymous namespace\)::|c10::|torch::headeronly::)", "", name)
        name = re.sub(r"^void ", "", name)
        name = re.sub(r"\(Source\)(\d)", lambda number: SOURCES[int(number[1])], name)
        depth = 0
        for i, character in enumerate(name):  # the parameters begin at the first bracket outside of <>
            depth += {"<": 1, ">": -1}.get(character, 0)
            if character == "(" and depth == 0:
                name = name[:i]
                break
        short.append(name)
    return short


# --- figures -------------------------------------------------------------------------------------------------------


def figures(kernel: Kernel) -> dict[str, Any]:
    """Return what the table says of a kernel: resources, and where WORK knows it, what a value or a product costs."""
    found = work_of(kernel.name)
    work, match = found if found else (Work(""), None)
    shared = kernel.static_shared + (work.shared(match) if match else 0)
    code = kernel.code
    row: dict[str, Any] = {
        "registers": kernel.registers,
        "stack": kernel.stack + 4 * sum(i.base in ("LDL", "STL") for i in code.instructions),
        "shared": shared,
        "blocks": resident_blocks(kernel.threads, kernel.registers, shared),
        "divisions": kernel.divisions,
    }
    if work.finishes:
        path = code.finishing()
        sums = sum(i.loads and i.bytes == 16 for i in path)
        row["finish"] = round((len(path) - sums) / (4 * sums), 2)
        return row
    paths = kernel.main_loops
    row["loads"] = kernel.widths(loads=True)
    row["stores"] = kernel.widths(loads=False)
    if not match or not paths:
        return row
    products = sum(i.base in MMA for i in paths[0])
    if products:
        row["slots"] = round(16 * len(paths[0]) / products, 1)
        row["prologue"] = len(code.before(paths[0]))
        return row
    read, written = work.bytes_of_value(match)
    instructions, cycles = 0.0, 0.0
    for path in paths:
        values = values_of(path, read, written, work.widths(match))
        instructions += len(path) / values
        cycles += max(slow(path)) / values
    row["bytes"] = read + written
    row["instructions"] = round(instructions, 2)
    row["units"] = round(cycles, 3)
    return row


def slow(path: Sequence[Instruction]) -> list[float]:
    """Return the cycles of a multiprocessor for each lane that the slower units take, unit by unit."""
    totals: dict[int, int] = {64: 0, 32: 0, 16: 0}
    for instruction in path:
        lanes = UNITS.get(instruction.base)
        if lanes and not instruction.opcode.startswith(("F2F.BF16", "F2F.F16")):
            totals[lanes] += 1
    return [count / lanes for lanes, count in totals.items()]


def values_of(
    path: Sequence[Instruction], read: float, written: float, widths: Mapping[bool, int] | None = None
) -> float:
    """Return how many values an iteration handles, by its widest accesses on the side with more bytes a value."""
    for loads, size in sorted(((True, read), (False, written)), key=lambda side: -side[1]):
        moved = [i.bytes for i in path if i.bytes and i.loads == loads]
        if moved and size:
            width = (widths or {}).get(loads, max(moved))
            return moved.count(width) * width / size
    raise SystemExit("sass: a main loop neither loads nor stores values; see WORK.")


def bandwidth(row: Mapping[str, Any]) -> float:
    """Return the bytes a second that the instructions of a memory-bound kernel allow, at most those of a copy."""
    cycles: float = max(row["instructions"] / (LANES * ISSUE), row["units"])
    return min(COPY, float(row["bytes"]) / cycles * MULTIPROCESSORS * CLOCK)


def tensor_share(row: Mapping[str, Any]) -> float:
    """Return the share of the tensor cores' int8 rate that the main loop allows at ISSUE of the issue slots."""
    products = 16 * 16 * 8 * 32  # multiplications of 16 instructions of a warp
    warps = MULTIPROCESSORS * CLOCK * 4 * ISSUE / float(row["slots"])
    return min(MMA_SHARE, warps * products / INT8_PRODUCTS)


def table(kernels: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table for readers, in Markdown. bfloat16 costs what float16 does, and is left out."""
    memory = [
        "| kernel | registers | stack | blocks | loads | stores | bytes / value | instr. / value | TB/s allowed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    products = [
        "| kernel | registers | stack | shared | blocks | 64-bit divisions | before the main loop | "
        "slots / 16 products | tensor cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    finish = [
        "| finish_kernel: output, residual, second output | instr. / output |",
        "|---|---|",
    ]
    for name, row in kernels.items():
        if "BFloat16" in name:
            continue
        begin = f"| `{name}` | {row['registers']} | {row['stack']} |"
        if "instructions" in row:
            memory.append(
                f"{begin} {row['blocks']} | {row['loads'] or '-'} | {row['stores'] or '-'} | {row['bytes']:g} | "
                f"{row['instructions']:.1f} | {bandwidth(row) / 1e12:.2f} |"
            )
        elif "slots" in row:
            products.append(
                f"{begin} {row['shared']} | {row['blocks']} | {row['divisions']} | {row['prologue']} | "
                f"{row['slots']:.0f} | {tensor_share(row):.0%} |"
            )
        elif "finish" in row:
            finish.append(f"| `{name}` | {row['finish']:.1f} |")
    return "\n".join([*memory, "", *products, "", *finish])


# --- the expectation -----------------------------------------------------------------------------------------------


def worse(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each figure of a kernel that is worse than expected.

    More registers are worse only where fewer blocks fit for them, and so is more shared memory.
    """
    sentences = []
    for key in ("stack", "divisions", "instructions", "units", "slots", "prologue", "finish"):
        if key in expected and found.get(key, 0) > expected[key]:
            sentences.append(f"{name}: {key} {expected[key]} -> {found[key]}")
    if found["blocks"] < expected["blocks"]:
        sentences.append(f"{name}: blocks {expected['blocks']} -> {found['blocks']}")
    for key in ("loads", "stores"):
        narrowest = [min(map(int, row.get(key, "").split()), default=16) for row in (expected, found)]
        if narrowest[1] < narrowest[0]:
            sentences.append(f"{name}: {key} of {expected[key]} bytes -> {found[key]}")
    return sentences


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what is worse than the committed table, and which kernels it does not know or knows in vain."""
    sentences = [f"{name}: not in the table" for name in found if name not in expected]
    sentences += [f"{name}: in the table, but not in the code" for name in expected if name not in found]
    for name in expected:
        if name in found:
            sentences += worse(name, expected[name], found[name])
    return sentences


def write_table(path: Path, release: str, kernels: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the expectation, a line for each kernel."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
    path.write_text(f'{{"nvcc": {json.dumps(release)}, "kernels": {{\n{lines}\n}}}}\n')


_BEGIN, _END = "<!-- tools/sass.py --update writes what follows -->\n", "<!-- end -->\n"


def documented(text: str, content: str) -> str:
    """Return a document with the part between its two marks replaced."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{content}\n\n{_END}{rest.split(_END, 1)[1]}"


# --- the command ---------------------------------------------------------------------------------------------------


def compile_kernels(folder: Path) -> None:
    """Compile every CUDA source for the one architecture, with the build's own flags."""
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in [str(ROOT / "csrc"), *cpp_extension.include_paths()]]
    for source in [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), FINISH]:
        architecture = f"-gencode=arch={ARCHITECTURE.replace('sm', 'compute')},code={ARCHITECTURE}"
        flags = [*build_config.NVCC_FLAGS, *includes, "-Xcompiler=-fPIC", architecture]
        _run([_tool("nvcc"), "-c", *flags, str(source), "-o", str(folder / f"{source.stem}.o")])


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, help="folder of compiled sources, NAME.o for NAME.cu")
    parser.add_argument("--check", action="store_true", help="fail where a kernel is worse than the table")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--listing", metavar="REGEX", help="print the main loops of the kernels that match")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as temporary:
        objects = options.objects or Path(temporary)
        if options.objects is None:
            compile_kernels(objects)
        files = sorted(objects.glob("*.o"))
        if not files:
            raise SystemExit(f"sass: {objects} has no object files.")
        kernels = [kernel for file in files for kernel in read_kernels(file)]
    if options.listing:
        for kernel in kernels:
            if re.search(options.listing, kernel.name):
                print_listing(kernel)
        return 0
    rows = {kernel.name: figures(kernel) for kernel in kernels}
    release = build_config.nvcc_release(_tool("nvcc"))
    if options.update:
        write_table(TABLE, release, rows)
        DOCUMENT.write_text(documented(DOCUMENT.read_text(), table(rows)))
        return 0
    print(table(rows))
    if not options.check:
        return 0
    expectation = json.loads(TABLE.read_text())
    if expectation["nvcc"] != release:
        print(
            f"sass: {TABLE.name} is of nvcc {expectation['nvcc']}, this is {release}; run --update, see what changed."
        )
        return 1
    sentences = compare(expectation["kernels"], rows)
    if DOCUMENT.read_text() != documented(DOCUMENT.read_text(), table(expectation["kernels"])):
        sentences.append(f"{DOCUMENT.name} shows another table than {TABLE.name}; run --update.")
    for sentence in sentences:
        print(f"sass: {sentence}")
    better = sum(1 for name in rows if worse(name, rows[name], expectation["kernels"].get(name, rows[name])))
    if better and not sentences:
        print(f"sass: {better} kernels are better than the table; run --update.")
    return int(bool(sentences))


def print_listing(kernel: Kernel) -> None:
    """Print the main loops of a kernel."""
    for path in kernel.main_loops:
        print(f"\n{kernel.name}: {len(path)} instructions")
        for i in path:
            predicate = f"@{i.predicate} " if i.predicate else ""
            print(f"  {i.address:06x}  {predicate:<5}{i.opcode} {i.operands}")
        counts: dict[str, int] = {}
        for i in path:
            counts[i.base] = counts.get(i.base, 0) + 1
        print("  " + "  ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda entry: -entry[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
