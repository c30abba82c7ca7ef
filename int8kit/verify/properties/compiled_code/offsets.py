"""Check that no address is computed in too few bits: its 32-bit numbers stay below 2**31 for the largest tensors.

An offset such as row * stride passes 2**31 in matrices of more than 2 GiB, which few tests can afford. In the code the
numbers are followed instead: of thread 0 of the last program, in the first round of each loop, for a launch with the
extents of EXTENTS. With stream-K it is the last worker, whose tile is one of the last ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from int8kit.spec import Kernel, TileConfig
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.ptx import Instruction, Program, parse, registers, split
from int8kit.verify.properties.compiled_code.synchronization import is_global
from int8kit.verify.properties.compiled_code.values import Values

EXTENTS = {
    "M": 2**20, "N": 2**20, "K": 4096, "stride": 2**22, "group_m": 8, "workers": 132,
    "IMAGE_ROWS": 1, "PERIOD": 2**31 - 1,
}  # fmt: skip
"""Values of the integers of a launch; "stride" is for all strides. A tile of 256 rows of x stays below 2**31."""

ROWS = 2**27  # of a row kernel
_LIMIT = 2**31


def offsets(code: Code, config: TileConfig | None) -> str | None:
    """The first 32-bit number of an address that passes 2**31, or None. TMA computes the wgmma kernel's addresses."""
    if config is not None and config.kernel is Kernel.WGMMA:
        return None
    program = parse(code.ptx)
    values = _values(code, config, program)
    for access in filter(is_global, program.instructions):
        for one, register in _derivation(program, values, access):
            value = values.of(register)
            if re.fullmatch(r"%r\d+", register) and value is not None and not -_LIMIT <= value < _LIMIT:
                return f"{one} gives {value}, which has more than 32 bits, in the address of {access}"
    return None


def followed(code: Code, config: TileConfig | None) -> set[str]:
    """The arguments of the launch of which some access has an address of 2**31 or more: the check sees their rows."""
    program = parse(code.ptx)
    values = _values(code, config, program)
    found = set()
    for access in filter(is_global, program.instructions):
        address = values.of(_address(access))
        if address is not None and address >= _LIMIT:
            found |= program.origins(registers(_address(access))[0])
    return {name for name, parameter in code.parameters.items() if parameter in found and name.endswith("_ptr")}


def _values(code: Code, config: TileConfig | None, program: Program) -> Values:
    """The values of the launch. Pointers are 0."""
    numbers = {
        parameter: EXTENTS["stride" if name.startswith("stride") else name]
        for name, parameter in code.parameters.items()
        if name in EXTENTS or name.startswith("stride")
    }
    known = {"%ctaid.x": ROWS - 1, "%ctaid.y": 0, "%ctaid.z": 0}
    if config is not None:
        tiles = EXTENTS["M"] // config.block_m * (EXTENTS["N"] // config.block_n)
        known["%ctaid.x"] = (EXTENTS["workers"] if config.stream_k else tiles) - 1
    for one in program.find("ld.param"):
        [name] = re.findall(r"\w+_param_\d+", one.operands)
        known |= {register: numbers.get(name, 0) for register in registers(one.operands)[:1]}
    return Values(program, known, in_first_round=True)


def _address(access: Instruction) -> str:
    """The text of the address in global memory: the second one of a copy to shared memory, else the only one."""
    *_, last = re.findall(r"\[([^\]]*)\]", access.operands)
    return str(last)


def _derivation(program: Program, values: Values, access: Instruction) -> Iterator[tuple[Instruction, str]]:
    """The instructions whose results decide the address of an access, with the registers that they write.

    A choice between two numbers is followed to the chosen one: the other may have any value.
    """
    todo, seen = registers(_address(access)), set[str]()
    while todo:
        register = todo.pop()
        if register in seen:
            continue
        seen.add(register)
        for one in program.definitions.get(register, ()):
            if one.starts("ld", "atom"):
                continue
            yield one, register
            chosen = split(one.operands)[1:]
            if one.starts("selp") and (first := values.of(chosen[2])) is not None:
                chosen = [chosen[0] if first else chosen[1], chosen[2]]
            todo += registers(" ".join(chosen))
