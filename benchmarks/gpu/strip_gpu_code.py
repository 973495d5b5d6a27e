"""Zeroes a shared library's GPU code for other architectures than sm_90 (H100, H200), so that it compresses to little.

    python benchmarks/gpu/strip_gpu_code.py LIBRARY

Sizes and headers stay, so the library still loads. Kept: the machine code of sm_90 and sm_90a; in a container without
any, its PTX up to sm_90. The containers are in the section .nv_fatbin and begin with MAGIC.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

MAGIC, KEEP = 0xBA55ED50, 90
PTX, MACHINE_CODE = 1, 2


def sections(library: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section of a 64-bit ELF file."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    table = [struct.unpack_from("<IIQQQQIIQQ", library, offset + i * size) for i in range(count)]
    for row in table:
        start = table[names][4] + row[0]
        yield library[start : library.index(b"\0", start)].decode(), row[4], row[5]


def entries(library: bytes, begin: int, size: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Of each container: kind, architecture, offset and size of what is in it."""
    position = begin
    while position < begin + size - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", library, position)
        if magic != MAGIC:
            position += 8  # padding between containers
            continue
        at, position = position + header, position + header + length
        found = []
        while at < position:
            kind, _, head, body = struct.unpack_from("<HHIQ", library, at)
            (architecture,) = struct.unpack_from("<I", library, at + 28)
            found.append((kind, architecture, at + head, body))
            at += head + body
        if at != position:
            raise ValueError("not the container format that this script knows")
        yield found


def strip(library: bytes) -> bytes:
    out = bytearray(library)
    for name, begin, size in sections(library):
        if name not in (".nv_fatbin", "__nv_relfatbin"):
            continue
        for container in entries(library, begin, size):
            has_own = any(kind == MACHINE_CODE and architecture == KEEP for kind, architecture, *_ in container)
            for kind, architecture, start, body in container:
                own = kind == MACHINE_CODE and architecture == KEEP
                if not own and not (kind == PTX and not has_own and architecture <= KEEP):
                    out[start : start + body] = bytes(body)
    return bytes(out)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_bytes(strip(file.read_bytes()))
