"""Faults at random: `python tests/soak.py --kills 20 --minutes 10`, `python tests/soak.py --signals 10`.

Trains a tiny run undisturbed, then the same run again and again under kill -9 at random moments and at each
system call of a save, under signals, damage to the newest checkpoint and a second run on the same directory,
with and without data workers, in several configurations in turn. The final weights, averages and
moments must be those of the undisturbed run, bit for bit. Prints one line with the numbers; ends in an
AssertionError where a fault was not survived.

--signals does nothing but that: SIGTERM, SIGINT or SIGKILL at a random moment from process start on, to one
rank and to two of torchrun. What was started must end soon, two seconds later no process may be left, no
signal may make the trainer print a traceback, and every run must end with the same weights.
"""
import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

STEPS, EVERY = 60, 4
FLAGS = [
    "--size", "16", "--channels", "32", "--channel-mult", "1", "1", "--attn-resolutions", "8", "--patch", "1",
    "--head-dim", "16", "--text-length", "32", "--byte-width", "32", "--byte-layers", "1", "--device", "cpu",
    "--lr", "1e-3", "--prediction", "v",
    "--batch-size", "8", "--micro-batch", "4", "--steps", str(STEPS), "--warmup", "5", "--cooldown", "20",
    "--save-every", str(EVERY), "--log-every", "1"]
QUIET = ["--val-every", "0", "--sample-every", "0"]
# The kills strike these runs in turn: what goes before the command, and more flags.
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
CONFIGURATIONS = {
    "plain": ([], QUIET),
    "profiles": ([], [*QUIET, "--profiles", "3"]),
    "AdamW, learned variance": ([], [*QUIET, "--optimizer", "adamw", "--learn-sigma"]),
    "grey, importance sampling": ([], [*QUIET, "--picture-mode", "grey", "--t-density", "importance"]),
    "validation and grids": ([], ["--val-every", "7", "--sample-every", "9", "--val-images", "8"]),
    "two ranks": (TORCHRUN, QUIET),
    "two ranks, profiles": (TORCHRUN, [*QUIET, "--profiles", "3"])}
LATEST = 20                                                    # seconds from a signal to the end of a run
CALLS = {"mkdir": 4, "ftruncate": 4, "renameat": 4, "chmod": 4, "fsync": 8, "rename": 6, "unlinkat": 4,
         "rmdir": 2}
# With --profiles, whose snapshots are written and pruned before each checkpoint.
PROFILES = {"fsync": 14, "rename": 12, "chmod": 8, "unlink": 10}


def start(out: Path, workers: int, *before: str, more=QUIET, err=subprocess.PIPE) -> subprocess.Popen:
    command = [*before, sys.executable, str(ROOT / "train.py"), *FLAGS, *more, "--out", str(out)]
    return subprocess.Popen([*command, "--workers", str(workers)], start_new_session=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=err)


def processes(out: Path) -> dict[int, int]:
    """The processes of the run in `out`, and their parents."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0{out}\0".encode() in (process / "cmdline").read_bytes():      # a zombie has none
                found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:                                                       # it has ended meanwhile
            pass
    return found


def end(process: subprocess.Popen, number: int = 0, timeout: float = 3000) -> int:
    """Signal the whole group, if asked to, and wait; a traceback is a failure of its own."""
    if number:
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    return process.returncode


def seen(out: Path) -> int:
    """The last step in the log, of whole lines."""
    path = out / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    lines = content[:content.rfind(b"\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def written(out: Path) -> int:
    """The lines of the log."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(out: Path) -> int:
    """The newest checkpoint that verifies; whatever has its final name must."""
    folders = model.checkpoint_folders(out)
    for folder in folders:
        for name in ("ema", "train"):
            model.load_tensors(folder / f"{name}.safetensors")
    return int(folders[-1].name) if folders else 0


def digest(out: Path) -> str:
    newest = model.checkpoint_folders(out)[-1]
    tensors = [model.load_tensors(newest / f"{name}.safetensors")[0] for name in ("ema", "train")]
    return hashlib.sha256("".join(model.checksum(t, {}) for t in tensors).encode()).hexdigest()


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.faults, self.survived, self.lost, self.trained, self.rounds = {}, 0, 0, 0, 0
        self.failures, self.slowest = 0, 0.0
        self.want, self.ends = {}, {}
        self.configure("plain")
        self.strace = ["strace", "-f", "-qq", "-o", "/dev/null"]
        trial = [*self.strace, "true"]
        if not shutil.which("strace") or subprocess.run(trial, capture_output=True).returncode:
            print("note: no strace, or no right to trace: system calls are left out")
            self.strace = []

    def configure(self, name: str) -> None:
        """Which run is next; the first of its kind is run undisturbed beside it."""
        self.name, (self.before, self.more) = name, CONFIGURATIONS[name]
        self.out = self.folder / name.replace(" ", "-")
        if name not in self.want:
            straight = self.folder / "straight"
            assert end(start(straight, 0, *self.before, more=self.more)) == 0
            self.want[name] = digest(straight)
            shutil.rmtree(straight)

    def start(self, workers: int, *before: str) -> subprocess.Popen:
        return start(self.out, workers, *before, *self.before, more=self.more)

    def fault(self, kind: str, strike) -> bool:
        """Let `strike` do its worst to the run, and look at what is left; False where it says it missed."""
        if saved(self.out) >= STEPS:
            self.finish()
        before = saved(self.out)
        if strike(before) is False:
            return False
        after, log = saved(self.out), seen(self.out)
        self.faults[kind] = self.faults.get(kind, 0) + 1
        assert log - after <= EVERY, f"{kind}: {log - after} steps lost"
        assert len(model.checkpoint_folders(self.out)) >= min(1, before), kind
        self.lost += max(0, log - after)
        self.trained += max(0, log - before)
        self.survived += 1
        return True

    def finish(self, *before: str) -> None:
        """Let the run come to its end and compare it with the undisturbed one."""
        assert end(self.start(self.random.choice([0, 2]), *before)) == 0      # clears up
        wrong = f"{self.name}: the final weights are not those of the undisturbed run"
        assert digest(self.out) == self.want[self.name], wrong
        left = {p.name for p in (self.out / "checkpoints").iterdir() if not p.name.isdigit()}
        assert all(".damaged-" in name for name in left), left
        self.rounds += 1
        self.ends[self.name] = self.ends.get(self.name, 0) + 1
        shutil.rmtree(self.out)

    def kill(self, before: int) -> None:
        """At a random moment, of starting too, but mostly of training."""
        process = self.start(self.random.choice([0, 2]))
        if self.random.random() < 0.8:
            goal = before + self.random.randrange(1, 3 * EVERY)
            while seen(self.out) < min(goal, STEPS) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(self.random.random() * 0.2)
        else:
            time.sleep(self.random.random() * 4)
        if self.before:                                # torchrun gives each rank a group of its own
            there = sorted(processes(self.out))
            for pid in self.random.choice([there, there[-1:]]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=120)
            began = time.monotonic()
            while processes(self.out):
                assert time.monotonic() - began < LATEST, f"{self.name}: processes are left"
                time.sleep(0.05)
            return
        end(process, signal.SIGKILL)

    def stop(self, before: int) -> None:
        """SIGTERM or SIGINT to the trainer and its data workers, twice: no step is lost."""
        process, number = self.start(2), self.random.choice([signal.SIGTERM, signal.SIGINT])
        while seen(self.out) <= before and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        assert end(process, number) == 0
        assert saved(self.out) == seen(self.out)

    def system_call(self, call: str, when: int) -> bool:
        rule = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}"]
        return end(self.start(0, *self.strace, *rule)) in (-9, 137)

    def damage(self, before: int) -> None:
        """Cut the newest checkpoint, or flip one of its bits: the run goes back to the one before."""
        folders = model.checkpoint_folders(self.out)
        if len(folders) < 2:
            return self.kill(before)
        path = folders[-1] / f"{self.random.choice(['ema', 'train'])}.safetensors"
        content = bytearray(path.read_bytes())
        if self.random.random() < 0.5:
            content = content[:self.random.randrange(len(content))]
        else:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        process = self.start(0)
        time.sleep(self.random.random())
        assert end(process) == 0                                 # the damaged step is written anew

    def second(self, before: int) -> bool:
        """Another run on the same directory ends at once, and the first one is killed."""
        process = self.start(0)
        while seen(self.out) <= before and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            return False                                         # through before the other came
        os.killpg(process.pid, signal.SIGSTOP)                   # nor may it be through before that looks
        assert end(self.start(0)) == 2
        end(process, signal.SIGKILL)
        return True

    def send(self, number: int, ranks: int, whom: str, moment: float) -> None:
        """A signal to a rank, to torchrun or to all processes of a run, so long after its start, or at some
        step if that comes first."""
        kind, workers = f"{signal.Signals(number).name} to {whom} of {ranks}", self.random.choice([0, 2])
        goal = written(self.out) + self.random.randrange(1, 3 * EVERY)
        with open(self.folder / "err", "w+") as err:
            root, began = start(self.out, workers, *TORCHRUN if ranks > 1 else (), err=err), time.monotonic()
            while time.monotonic() < began + moment and written(self.out) < goal and root.poll() is None:
                time.sleep(0.01)
            moment = time.monotonic() - began
            there = processes(self.out)
            started = [pid for pid, parent in there.items() if parent == root.pid]
            meant = self.random.choice(started) if whom == "rank" and ranks > 1 and started else root.pid
            for pid in there if whom == "all" else {meant} & there.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent = time.monotonic()
            while root.poll() is None and time.monotonic() < sent + 60:
                time.sleep(0.05)
            took = time.monotonic() - sent
            time.sleep(2)
            left = processes(self.out)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            root.wait()
            err.seek(0)
            lines = err.read()
        if meant not in there:
            return                                                            # through before the signal
        self.faults[kind] = self.faults.get(kind, 0) + 1
        self.slowest = max(self.slowest, took)
        wrong = [f"{len(left)} processes left"] if left else []
        if took > LATEST:
            wrong.append("late")
        if number != signal.SIGKILL and ('train.py", line' in lines or (ranks == 1 and "Traceback" in lines)):
            wrong.append("a traceback")
        if ranks == 1 and root.returncode not in (0, -number):
            wrong.append(f"status {root.returncode}")
        if wrong:
            self.fail(f"{kind}, --workers {workers}, after {moment:.2f} s, ended {took:.1f} s later: "
                      f"{', '.join(wrong)}\n{lines}")

    def fail(self, line: str) -> None:
        self.failures += 1
        print(f"FAILED {line}", flush=True)

    def signals(self, minutes: float) -> int:
        """Signals for so long; the exit status."""
        began, takes = time.monotonic(), {}
        for ranks, before in ((1, ()), (2, TORCHRUN)):
            started = time.monotonic()
            self.finish(*before)
            takes[ranks] = time.monotonic() - started
        while time.monotonic() - began < 60 * minutes or self.out.exists():
            ranks = self.random.choice([1, 2])
            number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            whom = self.random.choice(["rank", "all"] if ranks == 1 else ["rank", "all", "torchrun"])
            self.send(number, ranks, whom, self.random.random() * takes[ranks])
            through = saved(self.out) >= STEPS or time.monotonic() - began > 60 * minutes
            if not through and self.random.random() < 0.9:
                continue
            try:                                                              # the series is at its end
                self.finish(*self.random.choice([(), TORCHRUN]))
            except AssertionError as e:
                self.fail(f"a run after signals: {e}")
                shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.folder)
        for kind, count in sorted(self.faults.items()):
            print(f"{count:4} {kind}")
        print(f"{sum(self.faults.values())} signals, {self.failures} failures, the slowest end after "
              f"{self.slowest:.1f} s; {self.rounds} runs ended with the weights of the undisturbed run, bit "
              f"for bit; {(time.monotonic() - began) / 60:.0f} minutes")
        return 1 if self.failures else 0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20, help="kill -9 at so many random moments")
    p.add_argument("--minutes", type=float, default=10, help="then other faults, so long in all [minutes]")
    p.add_argument("--profiles", action="store_true", help="train with --profiles 3")
    p.add_argument("--signals", type=float, default=0, help="instead, signals for so long [minutes]")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.profiles:
        FLAGS.extend(["--profiles", "3"])
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, args.seed)
    if args.signals:
        raise SystemExit(soak.signals(args.signals))
    for kill in range(args.kills):
        soak.configure(list(CONFIGURATIONS)[kill % len(CONFIGURATIONS)])
        soak.fault("random kill", soak.kill)
        if kill % 10 == 9:
            print(f"{kill + 1} kills, {soak.rounds} runs at their end, "
                  f"{(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    for name in CONFIGURATIONS:
        soak.configure(name)
        if soak.out.exists():
            soak.finish()
    soak.configure("plain")
    calls = PROFILES if args.profiles else CALLS
    for call, count in calls.items() if soak.strace else []:                  # of saving and pruning
        for when in range(1, count + 1):
            strike = "kill at a system call", lambda before: soak.system_call(call, when)
            if not soak.fault(*strike) and not soak.fault(*strike):           # once near the end of a run
                print(f"note: {call} number {when} never came")
    while time.monotonic() - began < 60 * args.minutes:
        kind = soak.random.choice(["stop", "damage", "second", "kill"])
        soak.fault({"second": "second run", "kill": "random kill"}.get(kind, kind), getattr(soak, kind))
    if soak.out.exists():
        soak.finish()
    shutil.rmtree(folder)
    kinds = ", ".join(f"{count} {kind}" for kind, count in soak.faults.items())
    count = sum(soak.faults.values())
    print(", ".join(f"{name} {ends}" for name, ends in soak.ends.items()))
    print(f"faults injected {count} ({kinds}), survived {soak.survived}, steps lost {soak.lost} of "
          f"{soak.trained}; {soak.rounds} runs ended with the weights of the undisturbed run, bit for bit; "
          f"{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
