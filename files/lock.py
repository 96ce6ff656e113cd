"""One process per output: a lock that ends with its process, however that ends.

The lock is an flock on a small file in the output folder, or beside an output file, that names the
process and its host. A file that a killed process left is taken over.

Covered: all processes of one machine; machines that share a disk whose server keeps locks (NFS 4,
NFS 3 with lockd, CephFS, GPFS, SMB, Lustre mounted with -o flock). Not covered: disks mounted with
local locks or none (NFS with nolock or local_lock, Lustre with localflock or without flock, sshfs).
Where locking fails, a warning says so and the command goes on; of two processes there, the first
one still finds that the file names the other (`holds`), and stops.
"""
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class InUse(ValueError):
    """Another process has the lock."""


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def holds(lock_file: str) -> bool:
    """Whether the lock file names this process: not where its folder was deleted or made anew."""
    try:
        with open(lock_file, encoding="utf-8") as file:
            return file.read() == this_process()
    except (OSError, ValueError):
        return False


def take(lock_file: str, output: str) -> int:
    """The locked file's descriptor; ValueError if another process has it."""
    while True:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise InUse(f"{output} is in use by {holder}: wait for it, end it, or choose "
                                 "another output") from None
            print(f"warning: {lock_file} cannot be locked ({error.strerror}): no other process may "
                  f"write to {output} now", file=sys.stderr)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock_file)):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, this_process().encode(), 0)
                return descriptor
        os.close(descriptor)                 # its holder has just ended and removed the file


@contextmanager
def locked(lock_file: str, output: str) -> Iterator[None]:
    """Inside, no other process is inside with this lock file.

    output   what errors call it
    Missing folders are made; those in which nothing was written are removed again.
    raises   ValueError, which names host and process, if another process is inside
    """
    missing, folder = [], os.path.dirname(lock_file)
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(os.path.dirname(lock_file) or ".", exist_ok=True)
    descriptor = take(lock_file, output)
    try:
        yield
    finally:
        if holds(lock_file):
            os.remove(lock_file)
        os.close(descriptor)
        for folder in missing:
            with suppress(OSError):          # not empty
                os.rmdir(folder)
