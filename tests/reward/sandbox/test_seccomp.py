"""The filter is run by an interpreter of classic BPF, written from the kernel's description, for both processors."""

import struct

import pytest

from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.seccomp import program

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(filter_: bytes, machine: str, number: int, *arguments: int) -> int:
    """What the kernel returns for a call."""
    data = struct.pack("=iIQ6Q", number, AUDIT[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", filter_))
    at = value = 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        match operation:
            case 0x20:
                value = struct.unpack_from("=I", data, constant)[0]
            case 0x54:
                value &= constant
            case 0x15:
                at += if_true if value == constant else if_false
            case 0x35:
                at += if_true if value >= constant else if_false
            case 0x45:
                at += if_true if value & constant else if_false
            case 0x06:
                return constant


CASES = {
    # name: number on x86-64, on ARM, arguments, verdict; numbers from the kernel's tables
    "read": (0, 63, (), ALLOW),
    "execve": (59, 221, (), ALLOW),
    "exit_group": (231, 94, (), ALLOW),
    "ptrace": (101, 117, (), EPERM),
    "mount": (165, 40, (), EPERM),
    "unshare": (272, 97, (), EPERM),
    "bpf": (321, 280, (), EPERM),
    "last of the table": (314, 274, (), EPERM),
    "fork": (56, 220, (17,), ALLOW),
    "thread": (56, 220, (0x3D0F00,), ALLOW),
    "clone with a user namespace": (56, 220, (0x10000011,), EPERM),
    "clone with a time namespace": (56, 220, (0x80,), EPERM),
    "clone into the parent's children": (56, 220, (0x8011,), EPERM),
    "clone3": (435, 435, (), ENOSYS),
    "private memory": (9, 222, (0, 4096, 3, 0x22), ALLOW),
    "shared file": (9, 222, (0, 4096, 3, 0x01), ALLOW),
    "shared anonymous": (9, 222, (0, 4096, 3, 0x21), EPERM),
    "shared anonymous, huge pages": (9, 222, (0, 4096, 3, 0x40023), EPERM),
    "window size": (16, 29, (1, 0x5413), ALLOW),
    "TIOCSTI": (16, 29, (0, 0x5412), EPERM),
    "TIOCSTI, upper half set": (16, 29, (0, 1 << 32 | 0x5412), EPERM),
    "name": (157, 167, (15,), ALLOW),
    "die with the parent": (157, 167, (1, 9), ALLOW),
    "outlive the parent": (157, 167, (1, 0), EPERM),
    "unix socket": (41, 198, (1, 1), ALLOW),
    "pair of unix sockets": (53, 199, (1, 1), ALLOW),
    "pair of other sockets": (53, 199, (30, 1), EPERM),
    "internet socket": (41, 198, (2, 1), EPERM),
    "internet socket, version 6": (41, 198, (10, 1), EPERM),
    "vsock": (41, 198, (40, 1), EPERM),
    "netlink": (41, 198, (16, 3), EPERM),
}


@pytest.mark.parametrize("machine", AUDIT)
@pytest.mark.parametrize("name", CASES)
def test_calls(name: str, machine: str) -> None:
    *numbers, arguments, expected = CASES[name]
    number = numbers[list(AUDIT).index(machine)]
    assert verdict(program(machine=machine), machine, number, *arguments) == expected


@pytest.mark.parametrize("family", [1, 2, 10, 40])
def test_no_sockets_at_all(family: int) -> None:
    assert verdict(program(sockets=False, machine="x86_64"), "x86_64", 41, family) == EPERM


def test_other_architectures_are_killed() -> None:
    assert verdict(program(machine="aarch64"), "x86_64", 0) == KILL
    assert verdict(program(machine="x86_64"), "x86_64", 0x40000000) == KILL, "x32"


def test_unknown_processor() -> None:
    with pytest.raises(EngineError, match="riscv64"):
        program(machine="riscv64")


def test_fits_into_a_pipe_and_the_kernels_limit() -> None:
    assert len(program(machine="x86_64")) <= min(4096 * 8, 65536)
