"""Disturb small runs for some minutes: afterwards, the same command must end with the same bytes.

    make soak MINUTES=30                                        a table, and soak.json with figures
    .venv/bin/python tests/soak.py --minutes 30 --seed 1        another order of jobs and moments

A round: a job starts, is disturbed at a random moment once or more often, then the same command is
started once more and left alone. The round is lost if that does not end, or if any file but
trainer_state.json (it holds seconds) differs from an undisturbed run's, or is one too many.

    9, TERM, INT      a signal at a random moment, start-up included; among two ranks: to all
                      processes, to torchrun alone, or to one rank alone
    disk full         no file may grow beyond a random size (RLIMIT_FSIZE)
    restart           torchrun --max-restarts: one of two ranks is killed, nothing is started again
    two at once       the same command twice: one of them is refused, the other one goes on
Most single processes are forked from this one, which has imported torch: starting up is what costs.
"""
import argparse
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import torch  # noqa: E402
from helpers import kill_with_workers, processes_below, train_flags  # noqa: E402

import generate  # noqa: E402
import train  # noqa: E402
from files.cli import run_cli, time_left  # noqa: E402
from files.interrupt import catch_interrupts  # noqa: E402
from rlhf import ppo  # noqa: E402
from tools import export  # noqa: E402

MAINS = {"train.py": train.main, "rlhf.ppo": ppo.main, "generate.py": generate.main,
         "tools.export": export.main}
LIMIT = 180                      # seconds after which a command hangs
SIGNALS = {"9": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
PIPE_SIZE = 1031                 # fcntl's F_SETPIPE_SZ, Linux


# ---- jobs ---------------------------------------------------------------------------------------

@dataclass
class Job:
    """A command, and what an undisturbed run of it leaves."""
    name: str
    command: tuple                       # as conftest.launch takes it
    folder: Path                         # made anew for every round; holds all that is written
    ranks: int = 1
    seconds: dict[bool, float] = field(default_factory=dict)     # of a whole run, forked or not
    expected: dict[str, str] = field(default_factory=dict)       # see `content`


def make_jobs(work: Path) -> list[Job]:
    tokenizer = conftest.make_tiny_tokenizer(work / "tokenizer")
    model = conftest.save_tiny_model(work / "model", tokenizer)
    rng, words = Random(0), "the a cat dog sat ran on under mat hill".split()
    data = conftest.write_jsonl(work / "pairs.jsonl", [
        {"prompt": " ".join(rng.choices(words, k=5)), "chosen": f"{rng.choice(words)} yes",
         "rejected": f"{rng.choice(words)} no"} for _ in range(24)])

    def training(name, *flags, ranks=1):
        folder = work / "jobs" / name
        return Job(name, train_flags(model, data, folder / "run", "--save_steps", 1, *flags),
                   folder, ranks)

    made = work / "made"                                 # what other jobs read
    for method in ("reward_model", "sft"):
        run_alone(Job(method, train_flags(model, data, made / method, "--method", method,
                                          "--max_steps", 1), made), True)
    answers, merged = work / "jobs" / "generate", work / "jobs" / "export"
    ppo_flags = ("rlhf.ppo", "--reward_model", made / "reward_model", "--batch_size", 6,
                 "--max_new_tokens", 6, "--num_ppo_epochs", 1, "--max_steps", 4, "--save_steps", 1)
    return [
        training("sft", "--method", "sft", "--max_steps", 6),
        training("ulma, 2 epochs", "--method", "ulma", "--num_train_epochs", 2, "--logging_steps",
                 3),
        training("dpo, all weights", "--method", "dpo", "--lora_r", 0, "--max_steps", 4),
        training("kto", "--method", "kto", "--max_steps", 5, "--save_steps", 2),
        training("d2o", "--method", "d2o", "--num_anchors", 2, "--refresh_anchors", 2,
                 "--anchor_tokens", 4, "--max_steps", 5),
        training("reward model", "--method", "reward_model", "--max_steps", 5),
        Job("ppo", (*ppo_flags, "--output_dir", work / "jobs/ppo/run"), work / "jobs/ppo"),
        Job("generate", ("generate.py", "--model", model, "--dataset", data, "--out",
                         answers / "out.jsonl", "--batch_size", 2, "--max_new_tokens", 8), answers),
        Job("export", ("tools.export", "--model", model, "--adapter", made / "sft/final", "--out",
                       merged / "out"), merged),
        training("dpo, 2 ranks", "--method", "dpo", "--max_steps", 6, ranks=2),
        Job("ppo, 2 ranks", (*ppo_flags, "--output_dir", work / "jobs/ppo2/run"),
            work / "jobs/ppo2", 2),
    ]


def run_alone(job: Job, forked: bool) -> None:
    """Run a job undisturbed."""
    start, process = time.monotonic(), Process(job, forked)
    assert process.wait() == 0, process.output()
    job.seconds[forked] = time.monotonic() - start


def measure(job: Job) -> None:
    """Fill in what an undisturbed run takes and leaves; of a single process, of either kind."""
    for forked in (True, False) if job.ranks == 1 else (False,):
        new_folder(job)
        run_alone(job, forked)
        found = content(job.folder)
        assert job.expected in ({}, found), f"{job.name}: two undisturbed runs differ"
        job.expected = found
    print(f"{job.name}: {', '.join(f'{s:.1f} s' for s in job.seconds.values())}", flush=True)


def new_folder(job: Job) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)


def content(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of all that a job left; metrics without their speed."""
    found = {}
    for file in sorted(folder.rglob("*")):
        raw = b"" if file.is_dir() else file.read_bytes()
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in raw.splitlines()]
            raw = json.dumps([line | {"tokens_per_s": 0} for line in lines]).encode()
        if file.name != "trainer_state.json":
            found[str(file.relative_to(folder))] = hashlib.sha256(raw).hexdigest()
    return found


# ---- processes ----------------------------------------------------------------------------------

class Process:
    """A started job, forked from here or not; `limit` is the most bytes that its files may have."""

    def __init__(self, job: Job, forked: bool, limit: int | None = None, restarts: int = 0):
        self.reads, writes = os.pipe()
        fcntl.fcntl(writes, PIPE_SIZE, 1 << 20)          # nobody reads before the end
        self.popen, self.code, self.printed = None, None, b""
        sys.stdout.flush()
        if forked:
            self.pid = os.fork()
            if not self.pid:
                run_forked(job, writes, limit)
        else:
            argv = conftest.launch(*job.command, ranks=job.ranks)
            argv[4:4] = [f"--max-restarts={restarts}"] if restarts else []
            self.popen = subprocess.Popen(argv, stdout=writes, stderr=writes)
            self.pid = self.popen.pid
        os.close(writes)
        os.set_blocking(self.reads, False)

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.code is None and self.popen:
            self.code = self.popen.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code; None if it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.code

    def kill(self, number: int, whom: str) -> bool:
        """Send a signal to "all" processes, to the "first", or to one "rank"; whether there was
        one."""
        ranks = processes_below(self.pid)[1:]
        if whom == "all" and number == signal.SIGKILL:
            kill_with_workers(self)
        elif whom != "rank":
            os.kill(self.pid, number)
        elif ranks:
            os.kill(ranks[-1], number)
        return whom != "rank" or bool(ranks)

    def output(self) -> str:
        try:
            while part := os.read(self.reads, 1 << 16):
                self.printed += part
        except BlockingIOError:
            pass                                         # a rank that goes on has it open
        return self.printed.decode(errors="replace")


def run_forked(job: Job, writes: int, limit: int | None) -> None:
    """In the forked process: run the command as `python COMMAND` does, and end."""
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(writes, number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
        catch_interrupts()
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        command, *flags = map(str, job.command)
        run_cli(lambda: MAINS[command](flags))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# ---- disturbances -------------------------------------------------------------------------------

@dataclass
class Round:
    """One round: what was done, and what went wrong."""
    job: Job
    rng: Random
    done: Counter = field(default_factory=Counter)       # disturbance: how often
    faults: list[str] = field(default_factory=list)

    def start(self, **options) -> Process:
        self.forked = self.job.ranks == 1 and self.rng.random() < 0.85
        return Process(self.job, options.pop("forked", self.forked), **options)

    def pause(self, process: Process, share: float = 1.0) -> bool:
        """Wait for a random part of a run's time; whether the process still runs then."""
        return process.wait(self.rng.uniform(0, share * self.job.seconds[self.forked])) is None

    def check_end(self, process: Process, codes: tuple[int, ...], what: str) -> None:
        """A process must end with one of these codes, without a traceback of ours."""
        code = process.wait()
        shown = process.output()
        if code is None:
            kill_with_workers(process)
            self.faults.append(f"{what}: hangs: {shown[-500:]}")
        elif code not in codes or self.job.ranks == 1 and "Traceback" in shown:
            self.faults.append(f"{what}: exit code {code}: {shown[-500:]}")


def has_ended(shown: str) -> bool:
    """Whether a command found that the one before had done all."""
    return "holds a finished run" in shown or "is there already" in shown


def disturb_by_signals(round: Round) -> None:
    for _ in range(round.rng.choice((1, 2, 2, 3, 4))):
        process = round.start()
        name = round.rng.choice(("9", "9", "TERM", "INT"))
        whom = round.rng.choice(("all", "first", "rank")) if round.job.ranks > 1 else "all"
        if not round.pause(process):
            if not has_ended(process.output()):          # by a kill that came after its end
                round.check_end(process, (0,), "undisturbed")
            return
        if not process.kill(SIGNALS[name], whom):        # torchrun has not started its ranks yet
            process.kill(SIGNALS[name], whom := "first")
        round.done[name if round.job.ranks == 1 or whom == "all" and name == "9" else
                   f"{name} to {'one rank' if whom == 'rank' else 'torchrun'}"] += 1
        codes = {"9": (-9, 0), "TERM": (-15, 143, 0), "INT": (130, 0)}[name]
        round.check_end(process, codes if round.job.ranks == 1 else range(-64, 256), name)


def disturb_by_a_full_disk(round: Round) -> None:
    work = round.job.folder.parents[1]
    largest = max(file.stat().st_size for file in work.rglob("*.safetensors"))
    process = round.start(forked=True, limit=int(largest ** round.rng.uniform(0.3, 1)))
    round.done["disk full"] += 1
    round.check_end(process, (0, 2), "disk full")


def disturb_by_a_restart(round: Round) -> None:
    kills = round.rng.choice((1, 1, 2))
    process = round.start(restarts=kills)
    for _ in range(kills):
        killed = False
        round.pause(process, 0.5)
        while process.poll() is None and not killed:     # until torchrun has started its ranks
            killed = process.kill(signal.SIGKILL, "rank")
            time.sleep(0.01)
        round.done.update(["restart"] * killed)
    round.check_end(process, (0,), "restart")


def disturb_by_a_second(round: Round) -> None:
    first = round.start()
    round.pause(first, 0.7)
    second = round.start()
    round.done["two at once"] += 1
    codes = sorted((first.wait() or 0, second.wait() or 0))
    refused = 1 if round.job.ranks > 1 else 2            # torchrun's own code is 1
    if codes != [0, refused] and not (codes == [0, 0] and round.job.name == "generate"):
        round.faults.append(f"two at once: exit codes {codes}: {first.output()[-300:]} | "
                            f"{second.output()[-300:]}")


def finish(round: Round) -> None:
    """Start the same command and leave it alone; what it leaves must be as expected."""
    end = time.monotonic() + LIMIT
    while True:
        process = round.start()
        code, shown = process.wait(), process.output()
        if "in use by" not in shown or time.monotonic() > end:
            break
        time.sleep(0.2)                  # workers of a torchrun that was killed save and leave
    if code is None:
        kill_with_workers(process)
    if code != 0 and not has_ended(shown):
        round.faults.append(f"does not continue: exit code {code}: {shown[-500:]}")
        return
    found, expected = content(round.job.folder), round.job.expected
    if found != expected:
        names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        round.faults.append(f"other bytes: {', '.join(names)}")


DISTURBANCES: dict[Callable[[Round], None], tuple[float, float]] = {      # weights: 1 rank, more
    disturb_by_signals: (0.75, 0.55), disturb_by_a_full_disk: (0.13, 0),
    disturb_by_a_restart: (0, 0.35), disturb_by_a_second: (0.12, 0.1)}


# ---- the command --------------------------------------------------------------------------------

def soak(jobs: list[Job], rng: Random, minutes: float, rounds: int) -> list[Round]:
    """Rounds until the time or their number is over; prints a line for each."""
    start, ended, kills = time.monotonic(), [], 0
    while time.monotonic() - start < 60 * minutes and len(ended) < rounds:
        number = len(ended)
        job = jobs[number % len(jobs)]
        chosen = Random(f"{rng.random()}")
        disturb, = chosen.choices(list(DISTURBANCES), [
            weights[job.ranks > 1] for weights in DISTURBANCES.values()])
        round = Round(job, chosen)
        new_folder(job)
        disturb(round)
        finish(round)
        ended.append(round)
        kills += sum(round.done[name] for name in round.done if name not in ("disk full",
                                                                              "two at once"))
        seconds = time.monotonic() - start
        done = ", ".join(f"{count} x {name}" for name, count in round.done.items()) or "nothing"
        left = time_left(seconds, max(seconds / (60 * minutes), len(ended) / rounds), 1)
        print(f"{len(ended)}  {job.name:16} {done:34} "
              f"{'LOST: ' + '; '.join(round.faults) if round.faults else 'same bytes'}  "
              f"({kills} kills, {left})", flush=True)
    return ended


def table(rounds: list[Round]) -> list[dict]:
    """{job, disturbance, times, rounds, lost} of every job and disturbance."""
    rows = {}
    for round in rounds:
        for name, times in round.done.items():
            row = rows.setdefault((name, round.job.name), {
                "disturbance": name, "job": round.job.name, "times": 0, "rounds": 0, "lost": 0})
            row["times"] += times
            row["rounds"] += 1
            row["lost"] += bool(round.faults)
    return [rows[key] for key in sorted(rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="when to start no round more")
    parser.add_argument("--rounds", type=int, default=10 ** 9, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", help="only those whose names begin so")
    parser.add_argument("--out", default="soak.json", help="figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ |= conftest.ONE_THREAD
    start, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    jobs = [job for job in make_jobs(work) if job.name.startswith(tuple(args.jobs or [""]))]
    if not jobs:
        parser.error(f"no job's name begins with {', '.join(args.jobs)}")
    for job in jobs:
        measure(job)
    rounds = soak(jobs, Random(args.seed), args.minutes, args.rounds)
    rows, faults = table(rounds), [f"round {number} of seed {args.seed}, {round.job.name}: {fault}"
                                   for number, round in enumerate(rounds, 1)
                                   for fault in round.faults]
    print(f"\n{'disturbance':20} {'job':18} {'times':>6} {'rounds':>7} {'lost':>5}")
    for row in rows:
        print(f"{row['disturbance']:20} {row['job']:18} {row['times']:6} {row['rounds']:7} "
              f"{row['lost']:5}")
    minutes = (time.monotonic() - start) / 60
    print(f"{sum(row['times'] for row in rows)} disturbances in {len(rounds)} rounds, "
          f"{len(faults)} lost; {minutes:.0f} minutes", *faults, sep="\n")
    Path(args.out).write_text(json.dumps({
        "seed": args.seed, "minutes": minutes, "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "rounds": len(rounds), "rows": rows,
        "faults": faults}, indent=1) + "\n")
    if not faults:
        shutil.rmtree(work)
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
