"""A kernel that lacks something, by a seccomp filter that stands in: Python code that sets it and becomes the command of its arguments."""

# Netlink sockets of netfilter cannot be made.
WITHOUT_NF_TABLES = """
import ctypes, errno, os, struct, sys
AUDIT_ARCH, SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[os.uname().machine]
code = [
    (0x20, 0, 0, 4), (0x15, 0, 7, AUDIT_ARCH),  # the architecture
    (0x20, 0, 0, 0), (0x15, 0, 5, SOCKET),
    (0x20, 0, 0, 16), (0x15, 0, 3, 16),  # AF_NETLINK
    (0x20, 0, 0, 32), (0x15, 0, 1, 12),  # NETLINK_NETFILTER
    (0x06, 0, 0, 0x00050000 | errno.EPROTONOSUPPORT), (0x06, 0, 0, 0x7FFF0000),
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""

# sched_setscheduler is not permitted, as with `SystemCallFilter=~@resources` in a unit.
WITHOUT_POLICIES = """
import ctypes, errno, os, struct, sys
AUDIT_ARCH, SCHED_SETSCHEDULER = {"x86_64": (0xC000003E, 144), "aarch64": (0xC00000B7, 119)}[os.uname().machine]
code = [
    (0x20, 0, 0, 4), (0x15, 0, 3, AUDIT_ARCH),  # the architecture
    (0x20, 0, 0, 0), (0x15, 0, 1, SCHED_SETSCHEDULER),
    (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000),
]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
