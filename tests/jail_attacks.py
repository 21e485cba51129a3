"""A decoder process whose `probe` does what an attacker's code would do in its place, and says what came of it.

Run as `python jail_attacks.py LACKS ARGUMENTS`, where ARGUMENTS are those of kinoray.video.sandbox.child and LACKS
names what the machine refuses (commas between): `filter` (seccomp), `namespaces`, `landlock`. The kernel refuses them
here, by a filter of our own that comes first. All else is the real child.
"""

import ctypes
import mmap
import os
import platform
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kinoray.config.shared import ClipConfig
from kinoray.video.frames import Frames
from kinoray.video.info import VideoInfo
from kinoray.video.sandbox import child

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.mmap.restype = ctypes.c_void_p

AT_FDCWD = -100
X32 = 0x40000000
NUMBERS = {  # x86_64, aarch64
    "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "execveat": (322, 281),
    "clone": (56, 220),
    "unshare": (272, 97),
    "name_to_handle_at": (303, 264),
    "seccomp": (317, 277),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
BUFFER = ctypes.create_string_buffer(4096)
"""What calls read and write: more than any of them fills."""
LACKS = {"filter": ("seccomp",), "namespaces": ("unshare",), "landlock": ("landlock_create_ruleset",)}


def number(name: str) -> int:
    """The number of a system call on this machine."""
    newer = {
        "pidfd_send_signal": 424,
        "io_uring_setup": 425,
        "open_tree": 428,
        "pidfd_open": 434,
        "clone3": 435,
        "openat2": 437,
        "pidfd_getfd": 438,
        "landlock_create_ruleset": 444,
        "memfd_secret": 447,
    }
    if name in newer:
        return newer[name]
    return NUMBERS[name][platform.machine() == "aarch64"]


def refuse(names: list[str]) -> None:
    """Have the kernel answer EPERM to these calls from now on, as a container's profile does."""
    program = [(0x20, 0, 0, 0)]
    for name in names:
        program += [(0x15, 0, 1, number(name)), (0x06, 0, 0, 0x00050001)]
    program.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    LIBC.prctl(38, 1, 0, 0, 0)
    if LIBC.syscall(number("seccomp"), 1, 0, header):
        raise OSError(ctypes.get_errno(), "the kernel has no seccomp")


def call(name: str, *arguments: Any) -> Callable[[], int]:
    """A system call by its number."""
    return lambda: LIBC.syscall(number(name), *arguments)


def attacks(parent: int, port: int, unix: str, readable: str, folder: str, input_fd: int) -> dict[str, Any]:
    """Name -> what gives -1 and sets errno if it is refused."""
    address = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), bytes([127, 0, 0, 1]))
    path, new = readable.encode(), f"{folder}/new".encode()
    vector = struct.pack("@PN", ctypes.addressof(BUFFER), 8)
    limit = struct.pack("=QQ", 2**40, 2**40)

    def connect() -> int:
        descriptor = LIBC.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        return descriptor if descriptor < 0 else LIBC.connect(descriptor, address, len(address))

    def connect_unix() -> int:
        descriptor = LIBC.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0)
        name = struct.pack("=H", socket.AF_UNIX) + unix.encode() + b"\0"
        return descriptor if descriptor < 0 else LIBC.connect(descriptor, name, len(name))

    def fork() -> int:
        made = LIBC.fork()
        if made == 0:
            os._exit(0)
        return made

    parent_file = f"/proc/{parent}"
    return {
        "connect": connect,
        "connect to a unix socket": connect_unix,
        "socketpair": lambda: LIBC.socketpair(socket.AF_UNIX, socket.SOCK_STREAM, 0, BUFFER),
        "netlink": lambda: LIBC.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        "raw packets": lambda: LIBC.socket(socket.AF_PACKET, socket.SOCK_RAW, 0),
        "execve": lambda: LIBC.execve(b"/bin/true", None, None),
        "execveat": call("execveat", AT_FDCWD, b"/bin/true", None, None, 0),
        "fork": fork,
        "clone": call("clone", 17, None, None, None, None),
        "clone with its own network": call("clone", 0x40010000, None, None, None, None),
        "clone3": call("clone3", BUFFER, 64),
        "open": lambda: LIBC.open(path, os.O_RDONLY),
        "openat": lambda: LIBC.openat(AT_FDCWD, path, os.O_RDONLY),
        "openat2": call("openat2", AT_FDCWD, path, struct.pack("=QQQ", 0, 0, 0), 24),
        "open for writing": lambda: LIBC.open(path, os.O_WRONLY),
        "create": lambda: LIBC.open(new, os.O_WRONLY | os.O_CREAT, 0o600),
        "open by handle": call("open_by_handle_at", AT_FDCWD, BUFFER, 0),
        "name to handle": call("name_to_handle_at", AT_FDCWD, path, BUFFER, BUFFER, 0),
        "open the terminal": lambda: LIBC.open(b"/dev/tty", os.O_RDWR),
        "the parent's environment": lambda: LIBC.open(f"{parent_file}/environ".encode(), os.O_RDONLY),
        "the parent's memory": lambda: LIBC.open(f"{parent_file}/mem".encode(), os.O_RDWR),
        "own memory as a file": lambda: LIBC.open(b"/proc/self/mem", os.O_RDWR),
        "ptrace": lambda: LIBC.ptrace(16, parent, None, None),
        "process_vm_readv": call("process_vm_readv", parent, vector, 1, vector, 1, 0),
        "process_vm_writev": call("process_vm_writev", parent, vector, 1, vector, 1, 0),
        "kcmp": call("kcmp", os.getpid(), parent, 0, 0, 0),
        "kill": lambda: LIBC.kill(parent, 0),
        "kill all": lambda: LIBC.kill(-1, 0),
        "tgkill": lambda: LIBC.tgkill(parent, parent, 0),
        "sigqueue": call("rt_sigqueueinfo", parent, 10, BUFFER),
        "sigqueue to a thread": call("rt_tgsigqueueinfo", parent, parent, 10, BUFFER),
        "pidfd_open": call("pidfd_open", parent, 0),
        "pidfd_getfd": call("pidfd_getfd", 0, 0, 0),
        "pidfd_send_signal": call("pidfd_send_signal", 0, 0, None, 0),
        "limits of the parent": lambda: LIBC.prlimit(parent, resource.RLIMIT_AS, limit, None),
        "more address space": lambda: LIBC.setrlimit(resource.RLIMIT_AS, limit),
        "larger files": lambda: LIBC.setrlimit(resource.RLIMIT_FSIZE, limit),
        "more open files": lambda: LIBC.setrlimit(resource.RLIMIT_NOFILE, limit),
        "core files": lambda: LIBC.setrlimit(resource.RLIMIT_CORE, limit),
        "unshare": lambda: LIBC.unshare(0x10000000),
        "setns": lambda: LIBC.setns(0, 0),
        "mount": lambda: LIBC.mount(b"none", b"/", b"tmpfs", 0, None),
        "open_tree": call("open_tree", AT_FDCWD, b"/", 0),
        "chroot": lambda: LIBC.chroot(b".."),
        "chdir": lambda: LIBC.chdir(b"/"),
        "io_uring": call("io_uring_setup", 4, BUFFER),
        "userfaultfd": call("userfaultfd", 0),
        "bpf": call("bpf", 0, BUFFER, 64),
        "perf_event_open": call("perf_event_open", BUFFER, 0, -1, -1, 0),
        "keyctl": call("keyctl", 0, 0, 0, 0, 0),
        "another filter": call("seccomp", 2, 0, BUFFER),
        "chmod": lambda: LIBC.chmod(path, 0o777),
        "unlink": lambda: LIBC.unlink(path),
        "rename": lambda: LIBC.rename(path, new),
        "link": lambda: LIBC.link(path, new),
        "symlink": lambda: LIBC.symlink(path, new),
        "mkdir": lambda: LIBC.mkdir(new, 0o700),
        "truncate": lambda: LIBC.truncate(path, 0),
        "type into the terminal": lambda: LIBC.ioctl(0, 0x5412, b"x"),
        "dumpable again": lambda: LIBC.prctl(4, 1, 0, 0, 0),
        "live on without the parent": lambda: LIBC.prctl(1, 0, 0, 0, 0),
        "setuid": lambda: LIBC.setuid(0),
        "setsid": lambda: LIBC.setsid(),
        "renice": lambda: LIBC.setpriority(0, 0, -20),
        "shared memory of System V": lambda: LIBC.shmget(1, 4096, 0o1600),
        "memfd_create": lambda: LIBC.memfd_create(b"x", 0),
        "memfd_secret": call("memfd_secret", 0),
        "pipe": lambda: LIBC.pipe(BUFFER),
        "dup2": lambda: LIBC.dup2(0, 50),
        "signals by descriptor": lambda: LIBC.fcntl(0, 8, parent),
        "seals": lambda: LIBC.fcntl(input_fd, 1033, 8),
        "write to standard output": lambda: LIBC.write(1, b"x", 1),
        "write to the input": lambda: LIBC.pwrite(input_fd, b"x", 1, 0),
        "truncate the input": lambda: LIBC.ftruncate(input_fd, 0),
        "send descriptors": lambda: LIBC.sendmsg(0, BUFFER, 0),
        "receive descriptors": lambda: LIBC.recvmsg(0, BUFFER, 0),
    }


def outcome(action: Callable[[], int]) -> int:
    """The errno; 0 if it was not refused."""
    ctypes.memset(BUFFER, 0, len(BUFFER))  # what another call left there is an address to the next one
    ctypes.set_errno(0)
    return ctypes.get_errno() if action() == -1 else 0


def x32_open(path: str) -> int:
    """open() by the number that it has in the x32 ABI, which uses the same entry of the kernel."""
    return outcome(lambda: LIBC.syscall(X32 | 2, path.encode(), 0))


def call_as_32_bit() -> int:
    """getpid() by int 0x80: the numbers of i386, among which those allowed mean other calls."""
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def start_thread() -> str:
    """Empty if it ran."""
    ran: list[int] = []
    thread = threading.Thread(target=ran.append, args=(1,))
    try:
        thread.start()
    except RuntimeError as error:
        return str(error)
    thread.join()
    return "" if ran else "it did not run"


def fill_memory(output_fd: int, room_bytes: int) -> dict[str, Any]:
    """What came of taking more memory than a process is made for."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    found = {}
    try:
        mmap.mmap(-1, 2 * room_bytes + 1)
    except OSError as error:
        found["memory"] = error.errno
    os.ftruncate(output_fd, room_bytes)
    try:
        os.ftruncate(output_fd, room_bytes + 1)
    except OSError as error:
        found["output"] = error.errno
    return found


EVENTS: list[str] = []
"""What Python imported or opened."""


def remember(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    if event in ("import", "open", "ctypes.dlopen"):
        EVENTS.append(f"{event} {arguments[0]}")


def look(_: object, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    """What stands in place of the child's own `probe`."""
    what = arguments.pop("what")
    if what == "32 bit":
        return {"arrays": {}, "pid": call_as_32_bit()}
    if what == "events":
        seen = EVENTS.copy()
        EVENTS.clear()
        return {"arrays": {}, "events": seen}
    if what == "two answers":
        message = b'{"arrays": {}, "cpu_s": 0}'
        LIBC.send(int(sys.argv[1]), message, len(message), 0)
        return {"arrays": {}}
    if what == "fill memory":
        return {"arrays": {}} | fill_memory(int(sys.argv[3]), **arguments)
    if what == "abort":
        LIBC.abort()
    if what == "world":
        loaded = {name.partition(".")[0] for name in sys.modules}
        return {"arrays": {}, "environment": dict(os.environ), "modules": sorted(loaded), "uid": os.getuid()}
    found = {name: outcome(action) for name, action in attacks(input_fd=int(sys.argv[2]), **arguments).items()}
    return {"arrays": {}, "found": found, "x32": x32_open(arguments["readable"]), "thread": start_thread()}


DECODE = child._OPERATIONS["decode"]


def true_answer(space: child.OutputSpace, clip: ClipConfig) -> dict[str, Any]:
    """What a decoder says of a video of 30 frames, all grey, without flow."""
    shape = (1, clip.sample.num_segments, clip.sample.frames_per_segment)
    count, side = shape[1] * shape[2], clip.view.crop_px
    frames = Frames(
        frames=np.full((1, count, 3, side, side), 128, np.uint8),
        flow=None,
        partners=None,
        indices=(np.arange(count).reshape(shape),),
        windows=np.array([[0, 30]]),
        window_times=np.array([[0.0, 1.0]]),
        first_window=0,
        num_windows=1,
        mirrored=False,
        exact=True,
        num_frames=30,
        frames_decoded=30,
        frames_corrupt=0,
        info=VideoInfo(duration_s=1.0, fps=30.0, num_frames=30, width=64, height=48, codec="h264", rotation=0),
    )
    return child.pack(child.Decoded(frames, None), space)


def lie(space: child.OutputSpace, data: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    """An answer to `decode` that no decoder gives, if the video says which; else the real one."""
    if not data.startswith(b"lie: "):
        return DECODE(space, data, arguments)
    what = data.removeprefix(b"lie: ").decode()
    if what == "depth":  # written as JSON by ourselves: the encoder would fail first
        child.json.dumps = lambda *_, **__: "[" * 60_000
        return {}
    if what == "job error":
        return {"error": "StorageUnavailable", "text": "the store is down"}
    if what == "setting error":
        return {"error": "ConfigError", "text": "decode.backend is wrong"}
    answer = true_answer(space, arguments["clip"])
    frames, arrays = answer["record"]["frames"], answer["arrays"]
    lies: dict[str, tuple[dict[str, Any], str, Any]] = {
        "nothing but the truth": (frames, "num_frames", 30),
        "no frames": (arrays, "frames.frames", [0, "|u1", [1, 0, 3, 32, 32]]),
        "no arrays": (answer, "arrays", {}),
        "words for numbers": (frames["info"], "width", "wide"),
        "truth for a number": (frames, "frames_corrupt", True),
        "other fields": (frames["info"], "more", 1),
        "two counts": (frames, "num_frames", [30, 30]),
        "a list": (frames, "info", [1]),
        "no record": (answer, "record", None),
        "another size": (arrays, "frames.frames", [0, "|u1", [1, 8, 3, 16, 16]]),
        "another type": (arrays, "frames.frames", [0, "|i1", arrays["frames.frames"][2]]),
        "a frame that is not there": (frames, "num_frames", 3),
        "another window": (frames, "first_window", 1),
        "many samplings": (frames, "indices", 10**9),
        "too many frames": (frames, "frames_corrupt", 2**40),
        "too many promised": (frames["info"], "claimed_frames", 2**200),
        "too wide": (frames["info"], "width", 2**31),
        "a negative count": (frames["info"], "num_keyframes", -1),
        "no rate": (frames["info"], "fps", 1e308),
        "a turn": (frames["info"], "rotation", 12345),
        "an odd codec": (frames["info"], "codec", "\x1b[31mhi"),
        "windows elsewhere": (arrays, "frames.windows", [arrays["frames.frames"][0], "<i8", [1, 2]]),
        "windows before the video": (arrays, "frames.window_times", [arrays["frames.frames"][0], "<f8", [1, 2]]),
        "infinite count": (frames, "num_frames", float("inf")),
    }
    if what == "size":
        os.ftruncate(int(sys.argv[3]), 2**31 + 2**25)
        arrays["frames.frames"] = [0, "|u1", [2**31 + 2**24]]
    elif what == "flow that was not asked for":
        frames["flow"] = "array"
        arrays["frames.flow"] = [0, "|i1", [1, *arrays["frames.frames"][2][1:2], 2, *arrays["frames.frames"][2][3:]]]
    else:
        place, name, value = lies[what]
        place[name] = value
    return answer


if __name__ == "__main__":
    lacks = [name for lack in sys.argv.pop(1).split(",") if lack for name in LACKS[lack]]
    if lacks:
        refuse(lacks)
    child._OPERATIONS |= {"probe": look, "decode": lie}
    sys.addaudithook(remember)
    child.main()
