"""Keep the device code of one architecture in libnccl.so, so that it packs small.

Usage: `python tests/gpu/thin_nccl.py IN OUT [SM]`. SM is 90 for an H100.
The fat binaries stay where they are and keep their headers. The code of other architectures becomes zeros.
The driver picks the entry of its own architecture.
"""

import mmap
import shutil
import struct
import sys

MAGIC = b"\x50\xed\x55\xba"
HEADER = struct.Struct("<HHQ")  # version, bytes of this header, bytes of all entries
ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of the entry's header, bytes of its code
ELF = 2  # the kind of compiled code; the other one is PTX


def thin(library: mmap.mmap, architecture: int) -> tuple[int, int]:
    """Overwrite the code of every other architecture with zeros; return the bytes that were kept and overwritten."""
    kept = blanked = place = 0
    while (place := library.find(MAGIC, place)) >= 0:
        version, header_size, size = HEADER.unpack_from(library, place + len(MAGIC))
        if (version, header_size) != (1, 16):  # these four bytes are something else
            place += len(MAGIC)
            continue
        entry, end = place + header_size, place + header_size + size
        while entry + 64 <= end:
            kind, _, entry_header, code = ENTRY.unpack_from(library, entry)
            (found,) = struct.unpack_from("<I", library, entry + 28)
            if not 32 <= entry_header <= 4096 or not code:
                break
            if kind == ELF and found == architecture:
                kept += code
            else:
                start = entry + entry_header
                library[start : start + code] = bytes(code)
                blanked += code
            entry += entry_header + code
        place = end
    return kept, blanked


def main(source: str, target: str, architecture: str = "90") -> None:
    """Write the thin copy."""
    shutil.copyfile(source, target)
    with open(target, "r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        kept, blanked = thin(library, int(architecture))
    print(f"kept {kept / 1e6:.1f} MB of sm_{architecture}, blanked {blanked / 1e6:.1f} MB")
    if not kept:
        sys.exit(
            f"error: {source} has no code of sm_{architecture}. Give the GPU's compute capability without the dot."
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
