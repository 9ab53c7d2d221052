"""Which system calls a program in a box may not make, as a BPF program for the kernel's seccomp.

Namespaces take away what a program could reach; this takes away ways around them, memory that no limit counts, and
those parts of the kernel in which most holes have been found. A refused call fails with EPERM.
"""

import platform
import struct

from megatron_r1.errors import EngineError

X86_64, AARCH64 = 0, 1
ARCHITECTURES = {"x86_64": (X86_64, 0xC000003E), "aarch64": (AARCH64, 0xC00000B7)}
"""Column of `REFUSED`, and the kernel's AUDIT_ARCH number."""

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Memory that belongs to no process, and so escapes its limits.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Namespaces, mounts, files by other ways than their paths.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # Large and young parts of the kernel.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    # The machine.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
}

CLONE, CLONE3, MMAP, IOCTL, PRCTL = (56, 220), (435, 435), (9, 222), (16, 29), (157, 167)
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME."""
CLONE_PARENT = 0x8000
"""A child of the caller's parent: where there is no pid namespace that is the trainer, and the box has lost it."""
SHARED_ANONYMOUS = 0x21
"""MAP_SHARED and MAP_ANONYMOUS: stays in memory when no process has it mapped."""
TERMINAL = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: keys typed for others."""
PR_SET_PDEATHSIG, SIGKILL = 1, 9
"""A box may ask to be killed with its parent, and never take that back."""
AF_UNIX = 1
"""The only sockets there are. Network namespaces do not confine AF_VSOCK, which reaches a virtual machine's host; and
one in which TCP or UDP was spoken can take the kernel seconds to end, during which no other starts."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCH = 0, 4


def program(sockets: bool = True, machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Args:
        sockets: False refuses `socket` altogether (not `socketpair`): for boxes without a network namespace.
        machine: as `platform.machine()` names it; None is this one.

    Raises:
        EngineError: system calls of this processor are not in the table.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise EngineError(f"no list of system calls for {machine}; the sandbox knows {', '.join(ARCHITECTURES)}")
    column, audit = ARCHITECTURES[machine]
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, audit, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    if column == X86_64:  # the x32 variants of all calls
        code += [_op(_AT_LEAST, 0x40000000, 0, 1), _op(_RETURN, _KILL)]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += [_op(_EQUAL, number, 0, 1), _error(_EPERM)]
    code += [_op(_EQUAL, CLONE3[column], 0, 1), _error(_ENOSYS)]  # its flags are in memory; libc then uses clone
    code += _when(CLONE[column], [_argument(0), _op(_ANY_BIT, NEW_NAMESPACES | CLONE_PARENT, 0, 1), _error(_EPERM)])
    code += _when(
        MMAP[column],
        [
            _argument(3),
            _op(_AND, SHARED_ANONYMOUS),
            _op(_EQUAL, SHARED_ANONYMOUS, 0, 1),
            _error(_EPERM),
        ],
    )
    code += _when(IOCTL[column], [_argument(1), *(_op(*jump) for jump in _refuse_values(TERMINAL))])
    code += _when(
        PRCTL[column],
        [
            _argument(0),
            _op(_EQUAL, PR_SET_PDEATHSIG, 0, 3),
            _argument(1),
            _op(_EQUAL, SIGKILL, 1, 0),
            _error(_EPERM),
        ],
    )
    if not sockets:
        code += [_op(_EQUAL, SOCKET[column], 0, 1), _error(_EPERM)]
    for call in (SOCKET, SOCKETPAIR):
        code += _when(call[column], [_argument(0), _op(_EQUAL, AF_UNIX, 1, 0), _error(_EPERM)])
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _error(number: int) -> bytes:
    return _op(_RETURN, _ERRNO | number)


def _argument(index: int) -> bytes:
    """Load the lower half of an argument: struct seccomp_data is number, arch, instruction, 6 x 8 bytes."""
    return _op(_LOAD, 16 + 8 * index)


def _refuse_values(values: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [jump for value in values for jump in ((_EQUAL, value, 0, 1), (_RETURN, _ERRNO | _EPERM))]


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """Run `body` for one call, which ends in allowing it."""
    return [_op(_EQUAL, number, 0, len(body) + 1), *body, _op(_RETURN, _ALLOW)]
