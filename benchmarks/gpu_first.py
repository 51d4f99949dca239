"""The first eight minutes on a machine with an NVIDIA GPU: builds for it, and tells as it goes what is right and how
fast it is.

    benchmarks/gpu_check.sh first [PART...]                        default: all, in this order
    python benchmarks/gpu_first.py --device cpu kernels networks   tries it out on a CPU, on tiny sizes; see
                                                                   gpu_backends.py
    build      the package, its CUDA kernels for this GPU alone      build.log
    doctor     what runs here, and with what                         doctor.log
    kernels    every strategy and form of both backends, SE layers   kernels.jsonl, a line when a case is done
               and block tails, in float32, bfloat16 and float16,
               against float64
    layers     SENet-154's four stages at batch 64 in bfloat16,      layers-se.json, layers-tail.json, written again
               both layouts, forward and backward: SE and tails by   when a layer is done
               eager, compile, cuda, triton, a copy
    networks   a training step of seresnet50 and legacy_senet154:    networks-NAME.json
               stock, tails, without SE (senet_fused.models where
               there is no timm)

What is known so far is in first.json, whole at any second. No part waits for ever: each has its share of the time that
is left, a kernel that hangs is killed and told, and so is one that breaks the process; the rest goes on. Failures are
told when they are met, and again at the end. Exit status: 0 all right, 1 something failed or is missing, 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Seconds at most. All together get no more than --limit: a part has its share, by these, of what is left.
PARTS = {"build": 240, "doctor": 45, "kernels": 130, "layers": 160, "networks": 100}
LIMIT_S, CASE_LIMIT_S = 470, 45
RESTARTS = 4  # of a group of cases whose process broke
# What is printed of a failure, and how many at the end: the end of the output is what survives.
_SHOWN, _FAILURES = 600, 15
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BACKENDS = ("cuda", "triton")
GROUPS = [("cuda", "se"), ("triton", "se"), ("cuda", "tail"), ("triton", "tail")]
# By device: in how many processes a backend's cases run (Triton compiles), and what is measured.
PROCESSES = {"cuda": {"cuda": 1, "triton": 6}, "cpu": {"cuda": 1, "triton": 1}}
LAYERS = {
    "cuda": "--problem senet154 --batch 64 --cache cold --budget 0.4 --providers eager compile",
    "cpu": "--shape 2,16,4,5,7 --cache-size 0.001 --quick --providers eager",
}
NETWORKS = {"cuda": "--batch 64 --budget 3", "cpu": "--batch 2 --size 32 --quick"}
# timm's, and the same of senet_fused.models.
NAMES = {
    "cuda": {"seresnet50": "se_resnet50", "legacy_senet154": "senet154"},
    "cpu": {"legacy_seresnet18": "se_resnet20"},
}

# Asked in a process of its own: this one must not hold a context on the GPU.
_FACTS = """
import json, platform, torch
from senet_fused import machine
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "device": gpu and gpu.name, "capability": gpu and f"{gpu.major}.{gpu.minor}",
    "torch": torch.__version__, "triton": machine.package_version("triton"), "timm": machine.package_version("timm"),
    "python": platform.python_version(), "cpu": machine.cpu_name(), "revision": machine.revision(),
}))
"""
_REFUSALS = """
import json, sys, torch
from senet_fused import backends
device, *names = sys.argv[1:]
print(json.dumps({name: backends.refusal(name, device, torch.bfloat16) for name in names}))
"""


def write(path: Path, content: Any) -> None:
    """JSON; who reads the file meanwhile has what it was before or all of this."""
    half = path.with_name(f"{path.name}.part")
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def last_lines(path: Path, count: int = 12) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


class Processes:
    """Those that run, each the first of a process group, so that what it starts ends with it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self.ended = False

    @contextlib.contextmanager
    def start(self, command: Sequence[str], output: Any, errors: IO[str], **environment: str) -> Iterator[Any]:
        if self.ended:
            raise RuntimeError("interrupted")
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=errors, cwd=ROOT, text=True, start_new_session=True,
            env={**self._environment, **environment},
        )  # fmt: skip
        with self._lock:
            self._running.add(process)
        try:
            yield process
        finally:
            self.end(process)
            process.wait()
            with self._lock:
                self._running.discard(process)

    @staticmethod
    def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def end_all(self) -> None:
        """Those that run, and none is started any more."""
        with self._lock:
            self.ended = True
            for process in self._running:
                self.end(process)

    def run(self, command: Sequence[str], limit_s: float, log: Path, **environment: str) -> int | None:
        """The exit status, None if it did not end in time. It is interrupted first, to write what it has."""
        with log.open("w", encoding="utf-8") as file, self.start(command, file, file, **environment) as process:
            for number, seconds in ((None, limit_s), (signal.SIGINT, 10)):
                if number is not None:
                    self.end(process, number)
                try:
                    status = process.wait(max(0.0, seconds))
                    return status if number is None else None
                except subprocess.TimeoutExpired:
                    pass
        return None

    def ask(self, program: str, *arguments: str) -> Any:
        """What a short program prints as JSON. Raises RuntimeError."""
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
        return json.loads(done.stdout.splitlines()[-1])


class First:
    """One run: its time, its parts, and what is known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.start, self.deadline = time.monotonic(), time.monotonic() + args.limit
        self.facts: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []
        self.serving = list(BACKENDS)
        self._lock = threading.Lock()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.processes = Processes({**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})

    # ------------------------------------------------------------------------------------------ what is known

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)

    def say(self, text: str) -> None:
        print(f"[{self.seconds():5.0f} s] {text}", flush=True)

    def fail(self, text: str) -> None:
        with self._lock:
            self.failures.append(text)
        self.say(f"FAILED {text[:_SHOWN]}")

    def keep(self, part: str | None = None, **known: Any) -> None:
        """Adds to first.json what is known of a part."""
        with self._lock:
            if part is not None:
                self.parts.setdefault(part, {}).update(known)
            finished = {"finished": part is None and bool(known.get("finished")), "seconds": self.seconds()}
            write(self.out / "first.json", {**self.facts, **finished, "failures": self.failures, "parts": self.parts})

    # ------------------------------------------------------------------------------------------ parts

    def build(self, until: float) -> None:
        log = self.out / "build.log"
        environment = {"SENET_FUSED_CUDA": "1", "MAX_JOBS": str(CPUS)}
        if self.facts["capability"]:
            environment["TORCH_CUDA_ARCH_LIST"] = self.facts["capability"]
        command = ["setup.py", "-q", "build_ext", "--inplace"]
        self.judge("build", self.processes.run(command, until - time.monotonic(), log, **environment), log)

    def doctor(self, until: float) -> None:
        log = self.out / "doctor.log"
        self.judge("doctor", self.processes.run(["-m", "senet_fused", "doctor"], until - time.monotonic(), log), log)
        refusals = self.processes.ask(_REFUSALS, self.args.device, *BACKENDS)
        self.serving = [name for name, reason in refusals.items() if reason is None]
        self.keep("doctor", refusals=refusals)
        if self.args.device == "cuda":  # on a CPU the kernels are the host's, which their own programs load
            for name, reason in refusals.items():
                if reason is not None:
                    self.fail(f"doctor: {name} does not run: {reason}")

    def judge(self, what: str, status: int | None, log: Path) -> bool:
        """Tells how a command ended; whether well."""
        if status == 0:
            return True
        how = "out of time" if status is None else f"exit status {status}"
        self.fail(f"{what}: {how}; the end of {log.name}:\n{last_lines(log)}")
        return False

    def kernels(self, until: float) -> None:
        told = Counter()
        groups = []
        for backend, op in GROUPS:
            count = PROCESSES[self.args.device][backend]
            groups += [(backend, op, f"{number}/{count}") for number in range(count)]
        threads = str(max(1, CPUS // len(groups)))

        with (self.out / "kernels.jsonl").open("w", encoding="utf-8") as file:

            def keep(found: dict[str, Any]) -> None:
                with self._lock:
                    print(json.dumps(found), file=file, flush=True)
                    told[f"{found['backend']} {found['op']}: {found['status']}"] += found.get("count", 1)
                if found["status"] not in ("ok", "planned"):
                    case = ", ".join(str(found[key]) for key in ("case", "plan") if key in found)
                    self.fail(
                        f"kernels: {found['backend']} {found['op']}: {case or 'a process'}: {found['status']}: "
                        f"{found['detail']}"
                    )

            def run(group: tuple[str, str, str]) -> None:
                self.cases(group, until, keep, threads)

            with ThreadPoolExecutor(min(len(groups), CPUS)) as pool:
                try:
                    list(pool.map(run, groups))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.processes.end_all()
                    raise
        for backend, op in GROUPS:
            name = f"{backend} {op}"
            planned = told[f"{name}: planned"]
            done = sum(count for key, count in told.items() if key.startswith(f"{name}: ")) - planned
            if done < planned:
                self.fail(f"kernels: {name}: {planned - done} of {planned} cases have not run")
            self.say(f"kernels: {name}: {told[f'{name}: ok']} of {planned} cases are right")
        self.keep("kernels", cases=dict(sorted(told.items())))

    def cases(
        self, group: tuple[str, str, str], until: float, keep: Callable[[dict[str, Any]], None], threads: str
    ) -> None:
        """Keeps a line of each case of a group, which run in one process, or after one breaks or hangs in another."""
        backend, op, part = group
        name, done, planned = {"op": op, "backend": backend}, 0, None
        log = self.out / f"kernels-{backend}-{op}-{part.replace('/', '-of-')}.log"
        command = [*self.args.kernels, "--backend", backend, "--op", op, "--device", self.args.device]
        command += ["--part", part, "--lines", "--poison", "--every-dtype"]
        for _ in range(1 + RESTARTS):
            begun, hung, before = None, threading.Event(), done
            with (
                log.open("a", encoding="utf-8") as errors,
                self.processes.start(
                    [*command, "--skip", str(done)], subprocess.PIPE, errors, OMP_NUM_THREADS=threads
                ) as process,
            ):

                def kill(process: Any = process, hung: threading.Event = hung) -> None:
                    hung.set()
                    self.processes.end(process)

                watch = threading.Timer(until - time.monotonic(), kill)
                watch.start()
                for line in process.stdout:
                    if not line.startswith("{"):
                        continue
                    watch.cancel()
                    found = json.loads(line)
                    limit = min(self.args.case_limit, until - time.monotonic())
                    watch = threading.Timer(max(0.0, limit), kill)
                    watch.start()
                    if found["status"] == "begun":
                        begun = found
                    elif found["status"] != "planned":
                        begun, done = None, done + 1
                        keep(found)
                    elif planned is None:
                        planned = found["count"]
                        keep(found)
                status = process.wait()
                watch.cancel()
            if done == planned or self.processes.ended:
                return
            if time.monotonic() >= until - 0.1:  # what has not run is counted, if it is known how much there is
                if planned is None:
                    keep({**name, "status": "not begun", "detail": "no case within the time of this part"})
                return
            detail = f"{self.args.case_limit:g} s" if hung.is_set() else f"exit status {status}: {last_lines(log, 3)}"
            if begun is not None:
                keep({**begun, "status": "hung" if hung.is_set() else "died", "detail": detail})
                done += 1
            elif done == before:  # it does not come as far as to begin
                refused = {"status": "refused", "detail": last_lines(log, 1)}
                keep({**name, **(refused if status == 2 else {"status": "died", "detail": detail})})
                return

    def layers(self, until: float) -> None:
        for number, op in enumerate(("se", "tail")):
            path, log = (self.out / f"layers-{op}.{suffix}" for suffix in ("json", "log"))
            limit = (until - time.monotonic()) / (2 - number)
            command = ["-m", "senet_fused", "bench", "--op", op, "--device", self.args.device]
            command += [*LAYERS[self.args.device].split(), *self.serving, "--dtype", "bfloat16", "--plain"]
            command += ["--layout", "contiguous", "channels_last", "--direction", "forward+backward"]
            path.unlink(missing_ok=True)
            status = self.processes.run([*command, "--json", str(path)], limit, log)
            self.judge(f"layers: {op}", status, log)
            self.tell_rows("layers", op, path, ("shape", "layout"))

    def networks(self, until: float) -> None:
        names = NAMES[self.args.device]
        for number, (name, ours) in enumerate(names.items()):
            limit = (until - time.monotonic()) / (len(names) - number)
            models, variants = [name], ["stock", "tails", "no-se"]
            if self.facts["timm"] is None:
                self.say(f"networks: timm is not installed: {ours} of senet_fused.models in place of {name}")
                models = [f"{HERE / 'networks.py'}:{ours}_{way}" for way in ("stock", "tails", "no_se")]
                name, variants = ours, ["stock"]
            path, log = (self.out / f"networks-{name}.{suffix}" for suffix in ("json", "log"))
            command = ["-m", "senet_fused", "bench", "model", *models, "--providers", *variants, "--mode", "training"]
            command += ["--device", self.args.device, *NETWORKS[self.args.device].split(), "--plain"]
            command += ["--dtype", "bfloat16", "--amp", "--layout", "channels_last"]
            path.unlink(missing_ok=True)
            status = self.processes.run([*command, "--json", str(path)], limit, log)
            self.judge(f"networks: {name}", status, log)
            self.tell_rows("networks", name, path, ("model",))

    def tell_rows(self, part: str, what: str, path: Path, keys: Sequence[str]) -> None:
        """Of what a benchmark has left: a line for each case, and how many there are."""
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        cases: dict[str, list[str]] = {}
        for row in rows:
            name = " ".join(Path(row[key]).name if key == "model" else row[key] for key in keys)
            median = row["median_s"]
            told = row["error"] or row.get("note") or "nothing" if median is None else f"{median * 1e6:.1f} us"
            cases.setdefault(name, []).append(f"{row['provider']} {told}")
        for name, figures in cases.items():
            self.say(f"{part}: {what}: {name}: {', '.join(figures)}")
        for row in rows:
            if row["median_s"] is None:
                why = row["error"] or row.get("note")
                self.fail(f"{part}: {what}: {' '.join(str(row[key]) for key in keys)}: {row['provider']}: {why}")
        known = self.parts.get(part, {}).get("cases", {})
        self.keep(part, cases={**known, what: len(cases)})

    # ------------------------------------------------------------------------------------------ all of it

    def run(self) -> int:
        self.out.mkdir(parents=True, exist_ok=True)
        self.facts = self.processes.ask(_FACTS)
        if self.args.device == "cuda" and self.facts["device"] is None:
            print("gpu_first: PyTorch finds no NVIDIA GPU here, nothing checked (--device cpu tries it out)")
            return 2
        self.facts |= {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        self.facts |= {"tried_on": self.args.device, "asked": self.args.parts}
        self.say(f"{self.facts['device'] or 'a CPU'}, torch {self.facts['torch']}, {CPUS} cores; results in {self.out}")
        self.keep()
        try:
            for number, part in enumerate(self.args.parts):
                self.part(part, sum(PARTS[later] for later in self.args.parts[number:]))
        except KeyboardInterrupt:
            self.processes.end_all()
            self.fail("interrupted")
        self.keep(finished=True)
        if self.failures:
            print(f"\n{len(self.failures)} failures in {self.seconds():.0f} s, all of them in {self.out}/first.json:")
            for text in self.failures[:_FAILURES]:
                print(f"  {text[:_SHOWN]}")
            return 1
        print(f"\nall right in {self.seconds():.0f} s: {', '.join(self.args.parts)}; results in {self.out}")
        return 0

    def part(self, part: str, shares: float) -> None:
        start, before = time.monotonic(), len(self.failures)
        left = self.deadline - start
        if left <= 0:
            self.fail(f"{part}: out of time, not begun")
            self.keep(part, status="not begun")
            return
        # Without the build there is little to tell: it may take its time.
        limit = min(PARTS[part], left if part == "build" else left * PARTS[part] / shares)
        self.say(f"{part}: begins, {limit:.0f} s at most")
        self.keep(part, status="running")
        try:
            getattr(self, part)(start + limit)
        except Exception as error:  # one part's failure is told, not the end of the run
            self.fail(f"{part}: {type(error).__name__}: {error}")
        status = "ok" if len(self.failures) == before else "failed"
        self.keep(part, status=status, seconds=round(time.monotonic() - start, 1))
        self.say(f"{part}: {status} after {time.monotonic() - start:.0f} s")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder for results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for all (default %(default)s)")
    parser.add_argument(
        "--case-limit", type=float, default=CASE_LIMIT_S, metavar="SECONDS",
        help="after which a kernel counts as hung (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", type=shlex.split, default=[str(HERE / "gpu_kernels.py")], metavar="COMMAND",
        help="what runs the cases: another program, or options for it",
    )  # fmt: skip
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r} ({', '.join(PARTS)})")
    args.parts = [part for part in PARTS if part in (args.parts or PARTS)]
    args.out = args.out.resolve()
    return args


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job, and what it starts, ignores the latter
        signal.signal(number, signal.default_int_handler)
    return First(parse()).run()


if __name__ == "__main__":
    sys.exit(main())
