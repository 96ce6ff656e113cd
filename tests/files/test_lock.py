"""files/lock.py: one process per output; the lock ends with its process and names it."""
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from files.lock import holds, locked

HOLDER = """
import sys, time
from files.lock import locked
with locked(sys.argv[1], "the output"):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """holder(lock file): a process that is inside."""
    processes = []

    def start(lock_file):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock_file)], cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "inside\n"
        return process
    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_second_process_is_refused_and_told_who_is_inside_until_that_one_is_killed(
        tmp_path, holder):
    file = tmp_path / "run/.lock"
    process = holder(file)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^runs/a is in use by process {process.pid} on "
                                             rf"{socket.gethostname()}: wait for it"):
            with locked(str(file), "runs/a"):
                pytest.fail("two are inside")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert str(process.pid) in file.read_text()              # what a kill leaves
    with locked(str(file), "runs/a"):
        assert holds(str(file)) and str(os.getpid()) in file.read_text()
    assert not file.exists() and file.parent.exists()


def test_folders_that_were_made_for_the_lock_go_if_nothing_was_written(tmp_path):
    for written in (False, True):
        with pytest.raises(KeyError), locked(str(tmp_path / "a/b/.lock"), "a/b"):
            if written:
                (tmp_path / "a/b/file").write_text("x")
            raise KeyError
        assert (tmp_path / "a").exists() == written
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]


def test_a_folder_that_was_deleted_and_made_anew_belongs_to_the_other_process(tmp_path, holder):
    file = tmp_path / "run/.lock"
    with locked(str(file), "run"):
        shutil.rmtree(file.parent)
        assert not holds(str(file))
        process = holder(file)
        assert not holds(str(file))
    assert str(process.pid) in file.read_text()              # leaving does not take its lock away
    with pytest.raises(ValueError, match=str(process.pid)), locked(str(file), "run"):
        pass


def test_a_file_that_its_holder_removes_while_another_waits_for_it_is_not_taken(
        tmp_path, monkeypatch):
    # flock succeeds on a file without a name, that a third process would not find.
    file, flock = tmp_path / ".lock", fcntl.flock

    def late(descriptor, operation):
        flock(descriptor, operation)
        if not attempts:
            os.remove(file)
        attempts.append(descriptor)
    attempts = []
    monkeypatch.setattr(fcntl, "flock", late)
    with locked(str(file), "run"):
        assert len(attempts) == 2 and holds(str(file))


def test_on_a_disk_without_locks_a_warning_says_so_and_the_first_process_notices_a_second(
        tmp_path, monkeypatch, capsys):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    file = tmp_path / ".lock"
    with locked(str(file), "run"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
        assert holds(str(file))
        file.write_text("process 1 on another host")
        assert not holds(str(file))
