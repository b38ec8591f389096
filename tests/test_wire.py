"""What identifies a request, and answers as the kernel reads them."""

import struct

from imgfs import wire
from imgfs.wire import IN_HEADER, RESENT, Opcode

NODE = 5 | 3 << 32


def head_of(opcode: int, unique: int) -> wire.Head:
    return (IN_HEADER.size, opcode, unique, NODE, 0, 0, 77, 0, 0)


def test_a_request_is_known_by_its_number_also_when_it_is_sent_again() -> None:
    request = wire.identify(head_of(Opcode.UNLINK, 2))
    assert request == (Opcode.UNLINK, 77, NODE, 2)
    assert wire.identify(head_of(Opcode.UNLINK, 2 | RESENT)) == request
    assert wire.identify(head_of(Opcode.UNLINK, 4)) != request


def test_an_error_is_answered_as_the_kernel_reads_it() -> None:
    assert struct.unpack("<IiQ", wire.error_reply(2 | RESENT, 5)) == (16, -5, 2 | RESENT)
