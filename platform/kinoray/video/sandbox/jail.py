"""What a decoder process takes from itself before it reads a stranger's file: network, files, programs, privileges.

Layers, each of which holds by itself where the machine allows it; `enter` says which do. What is easy to break: no way
leads back, so all that decoding will ever load or open comes before `enter`, and the system calls that it may make
after that are listed here. A call that is not listed fails with EPERM, so a library that tries one goes on without.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence

__all__ = ["LAYERS", "SETUID_CAPABILITIES", "die_with", "enter"]

LAYERS = ("system calls", "network", "files", "root folder", "user", "capabilities")
"""What `enter` reports on: the filter of system calls, a network namespace of its own, Landlock, a root folder without
anything in it, a user without rights, no capabilities."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CLONE_NEWUSER, _CLONE_NEWIPC, _CLONE_NEWNET = 0x10000000, 0x08000000, 0x40000000
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080  # all namespaces
_CAPABILITIES_V3 = 0x20080522
SETUID_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
"""What root needs to become another user, and its parent to end a process of that user."""
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_SECCOMP_SET_MODE_FILTER, _SECCOMP_TSYNC, _SECCOMP_SPEC_ALLOW = 1, 1, 4
_F_GETFD, _F_GETFL, _F_DUPFD_CLOEXEC, _AT_EMPTY_PATH = 1, 3, 1030, 0x1000
_NOBODY = 65534
_MOST_FILES = 64
"""Descriptors; Python's mmap takes one for each array that has outgrown the shared file."""

_ARCHITECTURES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}
"""AUDIT_ARCH and the number of seccomp itself; in _NUMBERS, the columns in this order."""
_NEWER = 424
"""From here on all architectures share their numbers. Libraries try the newest calls first, and go on without after
ENOSYS; so a glibc of tomorrow works too. x32's numbers are above it as well."""
_NUMBERS = {
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "clone": (56, 220),
    "exit": (60, 93),
    "fcntl": (72, 25),
    "ftruncate": (77, 46),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "tgkill": (234, 131),
    "newfstatat": (262, 79),
    "set_robust_list": (273, 99),
    "prlimit64": (302, 261),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # instructions of classic BPF
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38
_ALL_BITS = 0xFFFFFFFF

Argument = tuple[int, int, Sequence[int]]
"""Which argument of a call, which bits of it, and the values that those may have."""
Instruction = tuple[int, int, int, int]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def die_with(parent: int) -> None:
    """Be killed by the kernel when the parent dies. Any change of user or capabilities undoes it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def enter(socket_fd: int, input_fd: int, output_fd: int, parent: int, *, threads: bool) -> dict[str, str]:
    """Keep three descriptors, memory and a clock, and give up the rest, for good.

    Args:
        threads: whether threads may still be started.

    Returns:
        Layer (LAYERS) -> why it is not in force here; "" where it is.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    layers = dict.fromkeys(LAYERS, "")
    network, folder = _unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
    _bound_capabilities()
    layers["user"] = _become_nobody()
    if network:  # as the machine's root only; a user namespace gives the right to it, if that is allowed
        network, folder = _unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)
        _bound_capabilities()
    layers |= {"network": network, "root folder": folder}
    layers["capabilities"] = _drop_capabilities()
    layers["files"] = _landlock()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST_FILES, _MOST_FILES))
    if not threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    die_with(parent)
    layers["system calls"] = _filter(_allowed(socket_fd, input_fd, output_fd, threads=threads))
    return layers


def _why() -> str:
    return os.strerror(ctypes.get_errno())


def _unshare(flags: int) -> tuple[str, str]:
    """Why there is no network of its own, and why no empty root folder."""
    if _libc.unshare(flags) != 0:
        return f"unshare: {_why()}", f"unshare: {_why()}"
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    try:
        os.chdir("/proc/self/fdinfo")  # shows the process itself, and has no file that can be written
        os.chroot(".")
    except OSError as error:
        return "", f"chroot: {error.strerror}"
    return "", ""


def _become_nobody() -> str:
    """Why this process goes on as root, if it does."""
    if os.geteuid() != 0:
        return ""
    found = ctypes.create_string_buffer(24)
    _libc.capget(struct.pack("=Ii", _CAPABILITIES_V3, 0), found)
    (held,) = struct.unpack_from("=I", found)
    missing = [name for name, bit in SETUID_CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        return f"root without {', '.join(missing)}"
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError as error:
        return f"setuid: {error.strerror}"
    return ""


def _bound_capabilities() -> None:
    """Let no capability be had again; does nothing without the one that it needs itself."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1


def _drop_capabilities() -> str:
    header, none = struct.pack("=Ii", _CAPABILITIES_V3, 0), bytes(24)
    return "" if _libc.capset(header, none) == 0 else f"capset: {_why()}"


def _landlock() -> str:
    """Refuse all files, TCP ports, abstract sockets and signals to others, as far as this kernel's Landlock knows them.

    It holds for this thread and those that it starts.
    """
    version = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return f"Landlock: {_why()}"
    num_accesses = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = struct.pack("=QQQ", 2**num_accesses - 1, 3, 3)[:size]  # what is named here and allowed nowhere is refused
    ruleset = _libc.syscall(_LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return f"Landlock: {_why()}"
    refused = _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    reason = f"Landlock: {_why()}" if refused else ""
    os.close(ruleset)
    return reason


def _allowed(socket_fd: int, input_fd: int, output_fd: int, *, threads: bool) -> dict[str, list[Argument]]:
    """The system calls of decoding, with what their arguments must be."""

    def one(argument: int, *values: int) -> Argument:
        return argument, _ALL_BITS, values

    conditions: dict[str, list[Argument]] = {
        "clone": [(0, _CLONE_THREAD | _CLONE_NEW, (_CLONE_THREAD,))],
        "fcntl": [one(1, _F_GETFD, _F_GETFL, _F_DUPFD_CLOEXEC)],
        "ftruncate": [one(0, output_fd)],
        "newfstatat": [(3, _AT_EMPTY_PATH, (_AT_EMPTY_PATH,))],  # the fstat of glibc 2.33 to 2.38
        "pread64": [one(0, input_fd)],
        "prlimit64": [one(0, 0), one(1, resource.RLIMIT_AS)],  # what one video may take
        "recvfrom": [one(0, socket_fd)],
        "sendto": [one(0, socket_fd)],
        "tgkill": [one(0, os.getpid())],  # abort
        "write": [one(0, 2)],
        "writev": [one(0, 2)],
    }
    return {name: conditions.get(name, []) for name in _NUMBERS if threads or name != "clone"}


def _filter(allowed: Mapping[str, Sequence[Argument]]) -> str:
    """Let the kernel refuse all other calls, for all threads."""
    machine = os.uname().machine
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        return f"no list of system calls for {machine}"
    column = list(_ARCHITECTURES).index(machine)
    architecture, seccomp = _ARCHITECTURES[machine]
    program = _program(architecture, {_NUMBERS[name][column]: checks for name, checks in allowed.items()})
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    # Without SPEC_ALLOW, kernels before 5.16 slow down all loads after stores of a filtered process.
    for flags in (_SECCOMP_TSYNC | _SECCOMP_SPEC_ALLOW, _SECCOMP_TSYNC):
        if _libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, flags, header) == 0:
            return ""
    return f"seccomp: {_why()}"


def _program(architecture: int, allowed: Mapping[int, Sequence[Argument]]) -> list[Instruction]:
    """(operation, skip if true, skip if false, constant) each; struct seccomp_data: number, architecture, arguments."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _NEWER),
        (_RETURN, 0, 0, _FAIL | _ENOSYS),
    ]
    for number, checks in allowed.items():
        body: list[Instruction] = []
        for argument, mask, values in checks:  # 32 bits: descriptors, flags and process ids have no more
            body.append((_LOAD, 0, 0, 16 + 8 * argument))
            body.append((_AND, 0, 0, mask))
            body.extend((_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values))
            body.append((_RETURN, 0, 0, _FAIL | _EPERM))
        body.append((_RETURN, 0, 0, _ALLOW))
        program.append((_EQUAL, 0, len(body), number))
        program.extend(body)
    program.append((_RETURN, 0, 0, _FAIL | _EPERM))
    return program
