"""What keeps a process from doing harm, on Linux: a function a layer, which raises where it is not to be had.

System calls go through ctypes, without a privilege or a program beside Python. `sandbox` says what the layers
are for.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import struct
from collections.abc import Callable, Sequence

FILES = 64 << 20  # bytes that a solution may write
LIBRARIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom")

CLONE_THREAD = 0x10000
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, pid, net, ipc, mounts
MS_PRIVATE_ALL = 1 << 18 | 1 << 14
MS_NOSUID_NODEV = 2 | 4
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # on every machine
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, EPERM, ENOSYS = 9, 1, 38

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column of the table below
# Refused system calls, by name in the comment, as numbers on x86_64 and aarch64 (-1: not there).
REFUSED = (
    (57, -1), (58, -1), (59, 221), (322, 281),  # fork, vfork, execve, execveat
    (41, 198), (42, 203), (49, 200), (50, 201),  # socket, connect, bind, listen
    (425, 425), (426, 426), (427, 427),  # io_uring_setup, _enter, _register
    (62, 129), (200, 130), (129, 138), (297, 240),  # kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
    (424, 424), (434, 434), (438, 438),  # pidfd_send_signal, pidfd_open, pidfd_getfd
    (101, 117), (310, 270), (311, 271),  # ptrace, process_vm_readv, process_vm_writev
    (90, -1), (91, 52), (268, 53), (452, 452),  # chmod, fchmod, fchmodat, fchmodat2
    (92, -1), (93, 55), (94, -1), (260, 54),  # chown, fchown, lchown, fchownat
    (132, -1), (235, -1), (261, -1), (280, 88),  # utime, utimes, futimesat, utimensat
    (188, 5), (189, 6), (190, 7), (463, 463),  # setxattr, lsetxattr, fsetxattr, setxattrat
    (197, 14), (198, 15), (199, 16), (466, 466), (469, 469),  # removexattr and its kin, file_setattr
    (272, 97), (308, 268), (165, 40), (166, 39), (155, 41), (161, 51),  # unshare, setns, mounts, chroot
    (428, 428), (429, 429), (430, 430), (431, 431), (432, 432), (433, 433), (442, 442),  # the newer mounts
    (321, 280), (298, 241), (323, 282),  # bpf, perf_event_open, userfaultfd
    (250, 219), (248, 217), (249, 218),  # keyctl, add_key, request_key
    (303, 264), (304, 265),  # name_to_handle_at, open_by_handle_at
    (175, 105), (313, 273), (176, 106), (246, 104), (320, 294),  # kernel modules, kexec
    (169, 142), (167, 224), (168, 225), (163, 89), (103, 116), (173, -1), (172, -1),  # reboot, swap, ports
    (164, 170), (227, 112), (159, 171), (305, 266), (170, 161), (171, 162),  # clocks, names of the host
    (141, 140), (203, 122), (144, 119), (142, 118), (314, 274), (251, 30),  # priorities of processes
    (29, 194), (64, 190), (68, 186), (240, 180),  # shmget, semget, msgget, mq_open: they outlive a process
    (319, 279), (447, 447),  # memfd_create, memfd_secret: memory that no limit counts
)  # fmt: skip
CLONE, CLONE3, TGKILL, PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)

Layers = Sequence[tuple[str, Callable[[], object]]]


def attempt(layers: Layers) -> list[str]:
    """Put up layers in order and name those that stand; what a machine does not offer is left out."""
    standing = []
    for name, put_up in layers:
        try:
            put_up()
        except (OSError, AttributeError, ImportError, ValueError):  # no such call, module, right or limit
            continue
        standing.append(name)
    return standing


def confinements(folder: str, readable: Sequence[str], seconds: float, memory: int, threads: bool) -> Layers:
    """The layers that a process puts up around itself, in an order in which none stands in another's way."""
    return (
        ("limits", lambda: _limit(seconds, memory)),
        ("no privileges", _drop_privileges),
        ("landlock", lambda: _restrict_files(folder, readable)),
        ("seccomp", lambda: _refuse_calls(threads)),
    )


def end_with_parent() -> None:
    """Have this process killed when its parent ends, where the system can."""
    attempt([("", lambda: _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))])


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library; `OSError` where it says -1."""
    found = ctypes.CDLL(None, use_errno=True)[name](
        *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    )
    if found == -1:
        raise OSError(ctypes.get_errno(), name)
    return found


def make_namespaces() -> None:
    """Namespaces for this process and, for process numbers, for those that it starts; the user is nobody."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", NAMESPACES)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {user} 1"),
        ("gid_map", f"65534 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_read_only(folder: str) -> None:
    """All mounts read-only, and a small file system in memory at `folder`, which becomes the current one."""
    _call("mount", None, b"/", None, MS_PRIVATE_ALL, None)
    _call("syscall", MOUNT_SETATTR, -100, b"/", 0x8000, struct.pack("QQQQ", 1 | 2, 0, 0, 0), 32)
    options = f"size={FILES},nr_inodes=4096,mode=700".encode()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, options)
    os.chdir(folder)


def _limit(seconds: float, memory: int) -> None:
    import resource

    whole = math.ceil(seconds) + 1
    wanted = {"CPU": whole, "AS": memory, "FSIZE": FILES, "NOFILE": 64, "CORE": 0, "NPROC": 64, "MEMLOCK": 0}
    for name, most in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _drop_privileges() -> None:
    """No capability, and none by way of a program."""
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _restrict_files(folder: str, readable: Sequence[str]) -> None:
    """Landlock: reads below `readable` and system libraries, writes below `folder`, nothing else opens."""
    version = _call("syscall", LANDLOCK_CREATE, None, 0, 1)
    every = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    read_file, read_folder, write_file, devices = 1 << 2, 1 << 3, 1 << 1, 1 << 6 | 1 << 11
    # From version 4 on no TCP, from version 6 on no signal and no abstract socket to the outside.
    rights = struct.pack("QQQ", every, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call("syscall", LANDLOCK_CREATE, rights, len(rights), 0)
    allowed = dict.fromkeys((*LIBRARIES, *readable), read_file | read_folder)
    allowed |= {folder: every & ~devices, os.devnull: read_file | write_file}
    for path, access in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            access &= read_file | write_file
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", access, place), 0)
        os.close(place)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _refuse_calls(threads: bool) -> None:
    """Seccomp: `REFUSED` and new processes fail with EPERM; `threads` lets threads start."""
    audit, column = MACHINES.get(platform.machine(), (0, 0))
    if not audit:
        raise OSError(ENOSYS, platform.machine())
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000, 0x7FFF0000

    def only_if(call: tuple[int, int], test: int, value: int) -> list[tuple[int, int, int, int]]:
        """Refuse a call unless its first argument passes; the argument's low half is at byte 16."""
        return [(equal, 0, 4, call[column]), (load, 0, 0, 16), (test, 0, 1, value),
                (give, 0, 0, allow), (give, 0, 0, refuse | EPERM)]  # fmt: skip

    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:  # the second table of calls of x86_64
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for call in REFUSED:
        if call[column] >= 0:
            program += [(equal, 0, 1, call[column]), (give, 0, 0, refuse | EPERM)]
    # Of clone3 the arguments cannot be read: the C library then takes clone.
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | ENOSYS)]
    program += only_if(CLONE, any_bit, CLONE_THREAD if threads else 0)
    program += only_if(TGKILL, equal, os.getpid())
    program += [*only_if(PRLIMIT, equal, 0), (give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    held = ctypes.create_string_buffer(code)
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_SECCOMP, 2, pointer, 0, 0)
