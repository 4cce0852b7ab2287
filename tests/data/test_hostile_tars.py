"""Tar files whose headers lie are named, in no time and without memory."""

import io
import tarfile

import pytest

from loraloom.configs.data_sections import ShardSource
from loraloom.data.source import open_source


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[0 : len(name)] = name.encode()
    block[100:108], block[124:136], block[156:157], block[257:265] = (
        b"0000644\0",
        size.ljust(12, b"\0"),
        kind,
        b"ustar\00000",
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def large(bits: int) -> bytes:
    return b"\x80" + (1 << bits).to_bytes(11, "big")


def pax(**fields: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = fields
        tar.addfile(info)
    return buffer.getvalue()


LIES = {
    "2^40 bytes of text": header("ok.txt", large(40)),
    "2^62 bytes of text": header("ok.json", large(62)),
    "2^80 bytes": header("ok.txt", large(80)),
    "fewer than none": header("ok.txt", b"\xff" * 12),
    "a pax header of 2^40 bytes": header("x", large(40), b"x"),
    "a long name of 2^40 bytes": header("x", large(40), b"L"),
    "pax says 10^20": pax(size=str(10**20)),
    "pax says 5,000 digits": pax(size="9" * 5000),
    "a map of holes that is none": pax(**{"GNU.sparse.map": "x,y", "GNU.sparse.size": "1000000000000"}),
    "names of names": b"".join(header("x", b"00000000001", b"L") + b"a".ljust(512, b"\0") for _ in range(3000)),
    "2 MiB of text": header("ok.txt", b"%011o" % (2 << 20)) + b"a" * (2 << 20),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_named(tmp_path, lie):
    file = tmp_path / "a.tar"
    file.write_bytes(LIES[lie] + bytes(1024))
    try:
        problems = open_source(ShardSource(shards=str(file), caption="a")).problems
    except ValueError as error:
        problems = [str(error)]
    assert len(problems) == 1 and problems[0].startswith(str(file)) and "\n" not in problems[0]
