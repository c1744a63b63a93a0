"""What every suite shares: jobs that are planned before they run, measured once, and found again by the hash of what they depend on.

A suite lists jobs; a job measures one thing (one draw, one word) and returns plain data; rows and bars are computed from those data
alone. So a run that was stopped goes on where it stopped, and what is expensive and does not change (baselines, the model's own
pictures) is measured once and shipped with the package.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from .. import __version__
from . import Profile

Result: TypeAlias = Mapping[str, Any]
"""What a job measured: plain JSON data. ``evals``: what it spent."""
Say: TypeAlias = Callable[[str], None]

DATA = Path(__file__).parent / "data"
"""Baselines that were measured before, one file a suite."""


@dataclass(frozen=True)
class Job:
    """One measurement. measure: a function at the top of its module, called with ``arguments`` (JSON), returning a ``Result``.

    part: what the plan and the progress call it. kind: what the result is stored as, wherever ``measure`` lives and whatever it is
    called: never changed, or what was measured before is no longer found. evals: at most what it spends. depends: digests of what else
    the result depends on (weights, code). baseline: no part of what is judged, so a result of another day, or none, will do. isolated:
    measured in a process of its own, whose peak memory joins the result as ``peak_mb``. exclusive: measured while nothing else is, after
    all that is not.
    """

    part: str
    kind: str
    measure: Callable[..., Result]
    arguments: Mapping[str, Any]
    evals: int
    depends: tuple[str, ...] = ()
    baseline: bool = False
    isolated: bool = False
    exclusive: bool = False

    @cached_property
    def key(self) -> str:
        """The hash of all that determines the result."""
        text = json.dumps([self.kind, self.arguments, self.depends, self.isolated], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Bar:
    """What a suite must reach. met: None where there is nothing to judge."""

    bar: str
    value: str
    met: bool | None


class Suite(Protocol):
    """A benchmark. ``jobs``: in order of importance; those that do not fit into ``limit`` evals are left out and said so."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> Profile: ...

    @property
    def limit(self) -> int | None: ...

    def jobs(self) -> Sequence[Job]: ...

    def rows(self, done: Mapping[str, Result], cached: frozenset[str]) -> list[dict[str, Any]]:
        """Rows from the results by job key; ``cached``: the keys of those that this run did not measure."""

    def bars(self, rows: Sequence[Mapping[str, Any]]) -> list[Bar]: ...


@dataclass(frozen=True)
class Plan:
    """What a run will do: measure ``fresh``, read ``known`` (by key), leave out ``dropped``, and leave ``elsewhere`` to other shards."""

    fresh: tuple[Job, ...]
    known: Mapping[str, Result]
    dropped: tuple[Job, ...]
    elsewhere: tuple[Job, ...] = ()

    @property
    def evals(self) -> int:
        """At most what the run spends."""
        return sum(job.evals for job in self.fresh)

    def describe(self) -> Iterator[str]:
        """The plan in lines for people: the evals of each part, then their sum."""
        for part in dict.fromkeys(job.part for job in self.fresh):
            jobs = [job for job in self.fresh if job.part == part]
            yield f"  {part}: {len(jobs)} x, at most {sum(job.evals for job in jobs):,} evals"
        if self.known:
            yield f"  measured before: {len(self.known)} results, 0 evals"
        for part in dict.fromkeys(job.part for job in self.dropped):
            jobs = [job for job in self.dropped if job.part == part]
            yield f"  left out, beyond the profile's limit: {part}, {len(jobs)} x, {sum(job.evals for job in jobs):,} evals"
        if self.elsewhere:
            yield f"  left to other shards: {len(self.elsewhere)} x, at most {sum(job.evals for job in self.elsewhere):,} evals"
        yield f"planned: at most {self.evals:,} evals in {len(self.fresh)} measurements"


def plan(suite: Suite, parts: Path | None, shard: tuple[int, int] = (0, 1), *, whole: bool = False) -> Plan:
    """Which of the suite's jobs to measure, given what is shipped and what the folder ``parts`` holds.

    shard: (index, count) measures one of ``count`` parts of the jobs, the same ones wherever it runs. whole: whatever the suite's limit.
    """
    shipped = _read(DATA / f"{suite.name}.json")
    fresh: list[Job] = []
    dropped: list[Job] = []
    known: dict[str, Result] = {}
    planned = 0
    for job in suite.jobs():
        stored = _read(parts / f"{job.key}.json") if parts else {}
        result = stored.get("result") or (shipped.get(job.key) if job.baseline else None)
        if result is not None:
            known[job.key] = result
        elif whole or suite.limit is None or planned + job.evals <= suite.limit:
            fresh.append(job)
            planned += job.evals
        else:
            dropped.append(job)
    mine, others = ([job for job in fresh if (int(job.key, 16) % shard[1] == shard[0]) is wanted] for wanted in (True, False))
    return Plan(tuple(mine), known, tuple(dropped), tuple(others))


def run(
    suite: Suite, parts: Path | None, *, processes: int, say: Say, shard: tuple[int, int] = (0, 1), whole: bool = False
) -> dict[str, Any]:
    """Plan, say the plan, measure, and return the report: suite, version, profile, machine, rows; bars, and what the run spent.

    suite: what to measure.
    parts: a folder that each result is written to at once and read from on the next run.
    processes: how many measure side by side, on one thread each; 0 measures in this process.
    say: hears the plan and each result, in lines for people.
    shard: (index, count) measures one of ``count`` parts. Their runs may share ``parts``, or have theirs put together afterwards; a last
        run without a shard makes the rows of all.
    whole: measure what is beyond the suite's limit, too.

    What a job raises ends the run; what was measured stays in ``parts``.
    """
    planned = plan(suite, parts, shard, whole=whole)
    say(f"bench {suite.name}, profile {suite.profile}")
    for line in planned.describe():
        say(line)
    start, done, spent = time.perf_counter(), dict(planned.known), 0
    for number, (job, result, seconds) in enumerate(_measured(planned.fresh, processes), 1):
        done[job.key] = result
        spent += int(result["evals"])
        if parts:
            _write(parts / f"{job.key}.json", {"part": job.part, "arguments": job.arguments, "seconds": seconds, "result": result})
        named = ", ".join(str(value) for key, value in job.arguments.items() if key != "model")
        say(f"[{number}/{len(planned.fresh)}] {job.part} ({named}): {result['evals']:,} evals, {seconds:.0f} s")
    rows = suite.rows(done, frozenset(planned.known))
    bars = suite.bars(rows)
    seconds = time.perf_counter() - start
    say(f"spent {spent:,} of at most {planned.evals:,} evals in {seconds:.0f} s")
    return {
        "suite": suite.name,
        "version": __version__,
        "profile": suite.profile,
        "machine": machine(processes),
        "rows": rows,
        "bars": [asdict(bar) for bar in bars],
        "run": {
            "planned_evals": planned.evals,
            "evals": spent,
            "seconds": round(seconds, 1),
            "measured": len(planned.fresh),
            "cached": len(planned.known),
            "left_out": len(planned.dropped),
            "commit": commit(),
        },
    }


def ship(suite: Suite, parts: Path, target: Path = DATA) -> int:
    """Store what ``parts`` holds of the suite's baselines with the package, in place of what is shipped; returns how many."""
    found = {job.key: _read(parts / f"{job.key}.json").get("result") for job in suite.jobs() if job.baseline}
    shipped = _read(target / f"{suite.name}.json")
    kept = {key: result if result is not None else shipped.get(key) for key, result in found.items()}
    kept = {key: result for key, result in kept.items() if result is not None}
    _write(target / f"{suite.name}.json", kept)
    return len(kept)


def _measured(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Result, float]]:
    """Each job with its result and seconds, as they finish."""
    if not processes:
        for job in jobs:
            yield job, *_measure(job)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        try:
            waiting: dict[Future[tuple[Result, float]], Job] = {pool.submit(_measure, job): job for job in jobs if not job.exclusive}
            failure: BaseException | None = None
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done & waiting.keys():
                    job = waiting.pop(future)
                    if future.exception() is None:
                        yield job, *future.result()
                    elif failure is None:  # what is under way elsewhere is not lost
                        failure = future.exception()
                        for other in [other for other in waiting if other.cancel()]:
                            del waiting[other]
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for job in jobs:
        if job.exclusive:
            # In a process of its own: what others have left there shows in its memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_its_own_threads) as alone:
                yield job, *alone.submit(_measure, job).result()


def _measure(job: Job) -> tuple[Result, float]:
    start = time.perf_counter()
    if job.isolated:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_one_thread) as alone:
            result = alone.submit(_measure_alone, job).result()
    else:
        result = job.measure(**job.arguments)
    return json.loads(json.dumps(result, allow_nan=False)), round(time.perf_counter() - start, 2)


def _measure_alone(job: Job) -> Result:
    return {**job.measure(**job.arguments), "peak_mb": peak_mb()}


def _one_thread() -> None:
    """Before torch is loaded: processes that share cores must not each start a thread per core."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _its_own_threads() -> None:
    """For what is measured alone, and says itself on how many threads: a limit in the environment is stronger than torch's."""
    os.environ.pop("OMP_NUM_THREADS", None)


def peak_mb() -> float | None:
    """The most memory this process has held, in MiB; None where the system does not say."""
    status = Path("/proc/self/status")
    # Preferred to getrusage, which can report the parent's, from before this process's own program was loaded.
    most_kb = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace")) if status.is_file() else None
    if most_kb is not None:
        return round(int(most_kb[1]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def machine(processes: int) -> dict[str, Any]:
    """What the figures were measured on."""
    libraries = {}
    for name in ("torch", "diffusers", "transformers"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            libraries[name] = "unknown"
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "processes": processes,
        "device": "cpu",
        "python": platform.python_version(),
        **libraries,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The commit this tree is at, with a plus sign where files differ from it; None outside a checkout."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    try:
        asked = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        said = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def summary(report: Mapping[str, Any]) -> str:
    """The bars of a report, each with what was reached and whether that meets it."""
    words = {True: "met", False: "NOT MET", None: "not judged"}
    return "\n".join(f"{words[bar['met']]:>10}  {bar['bar']}: {bar['value']}" for bar in report["bars"])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)
