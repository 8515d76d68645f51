"""Reads the machine code of a compiled kernel: its loops, and what one iteration of each executes."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*\}?\s*$"
)
_TARGET = re.compile(r"(\.L_x_\d+)|\b0x([0-9a-f]+)")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")


@dataclass(frozen=True)
class Instruction:
    address: int
    operation: str  # with its modifiers, such as "MUFU.EX2"
    operands: str


@dataclass(frozen=True)
class Loop:
    """One innermost loop: what a warp executes in one iteration.

    Args:
        copies_before: number of copies by tensor descriptors that are issued on the way to the loop.
    """

    instructions: tuple[Instruction, ...]
    copies_before: int = 0

    def count(self, *operations: str) -> int:
        """Number of instructions whose operation begins with one of `operations`."""
        return sum(x.operation.startswith(operations) for x in self.instructions)

    @property
    def size(self) -> int:
        return len(self.instructions)

    @property
    def exponentials(self) -> int:
        """Exponentials of one thread; those of rescaling are among them."""
        return self.count("MUFU.EX2")

    @property
    def products(self) -> Counter[str]:
        """Number of instructions of the tensor cores by shape, such as "64x64x16"."""
        shapes = Counter()
        for x in self.instructions:
            if x.operation.startswith(_PRODUCTS):
                shape = _SHAPE.match(x.operation)
                shapes["x".join(shape.groups()) if shape else x.operation.split(".")[0]] += 1
        return shapes

    @property
    def tensor_flops(self) -> int:
        """FLOPs of the `HGMMA` instructions of one warpgroup."""
        return sum(2 * m * n * k * count for m, n, k, count in self._hgmma())

    def _hgmma(self):
        for shape, count in self.products.items():
            if "x" in shape:
                yield *map(int, shape.split("x")), count

    @property
    def local(self) -> int:
        """Accesses to local memory, where spilled registers are."""
        return self.count("LDL", "STL")

    @property
    def boxes(self) -> int:
        """Number of copies by tensor descriptors (TMA)."""
        return self.count("UTMALDG")

    @property
    def ahead(self) -> int | None:
        """Number of iterations whose tiles are under way while a warp waits for one, at most; None where no
        tile is copied asynchronously.

        A copy by a thread (cp.async) is waited for with the number of younger groups that may be under way.
        A copy by descriptor has a barrier of its own: what was issued before the loop says how far they are
        ahead."""
        if self.boxes:
            return self.copies_before // self.boxes - 1
        waits = [
            int(x.operands.split(",")[1], 16)
            for x in self.instructions
            if x.operation.startswith("DEPBAR.LE") and "SB0" in x.operands and x.operands.count(",") == 1
        ]
        return min(waits, default=None)

    @property
    def waits(self) -> int:
        """Waits for the tensor cores."""
        return self.count("WARPGROUP.DEPBAR")


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]  # innermost ones with products of tiles
    others: tuple[Loop, ...] = ()  # innermost ones without, but for tries of waits

    @property
    def straight(self) -> int:
        """Number of instructions outside the loops, without second tries of waits behind the kernel's end."""
        ends = [i for i, x in enumerate(self.instructions) if x.operation == "EXIT"]
        end = ends[-1] + 1 if ends else len(self.instructions)
        return end - sum(loop.size for loop in (*self.loops, *self.others))


def disassemble(cubin: bytes) -> str:
    """Returns what the `nvdisasm` that Triton ships prints."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(text: str) -> Code:
    """Returns the code that `nvdisasm` printed."""
    found, labels = [], {}
    for line in text.splitlines():
        line = line.split("//")[0]
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append(Instruction(int(match[1], 16), match[2], match[3]))
    ranges = _ranges(found, labels)
    multiplying = {
        (a, b) for a, b in ranges if any(x.operation.startswith(_PRODUCTS) for x in found[a : b + 1])
    }
    loops, end = [], 0
    for a, b in _innermost(multiplying):
        before = sum(x.operation.startswith("UTMALDG") for x in found[end:a])
        loops.append(Loop(tuple(found[a : b + 1]), before))
        end = b + 1
    others = [
        Loop(tuple(found[x[0] : x[1] + 1]))
        for x in _innermost(ranges - multiplying)
        if not any(_inside(x, y) for y in multiplying)
    ]
    return Code(tuple(found), tuple(loops), tuple(loop for loop in others if not loop.count("SYNCS")))


def _ranges(found: list[Instruction], labels: dict[str, int]) -> set[tuple[int, int]]:
    """The first and last instruction of each loop."""
    at = {x.address: i for i, x in enumerate(found)}
    ranges = set()
    for i, x in enumerate(found):
        if x.operation.startswith("BRA") and (target := _TARGET.search(x.operands)):
            begin = labels.get(target[1]) if target[1] else at.get(int(target[2], 16))
            # Behind the end of the kernel stand second tries of waits, which go back to where they came from.
            if begin is not None and begin < i and not any(y.operation == "EXIT" for y in found[begin:i]):
                ranges.add((begin, i))
    return ranges


def _innermost(ranges: set[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(x for x in ranges if not any(x != y and _inside(y, x) for y in ranges))


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
