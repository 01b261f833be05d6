"""What only a GPU can say, in a given time: GPU tests, benchmarks, and the next published rows that are not measured.

  scripts/gpu_acceptance --seconds 540 --data DIR --out DIR
  scripts/gpu_acceptance --dry --data DIR      a rehearsal on the CPU: tests are collected only, rows are shrunken

Called again with the same --work it goes on where it was: rows go on from their checkpoints, and what has a result in
--out, or in benchmarks/results, is not measured again; nor are the tests run again with the same code on the same
machine, unless their time was up. A benchmark, or the tests, whose time was up is passed over until a tenth more is
offered (what `train` measured until then is kept, and later only the rest is measured); benchmarks that were not tried
come before one that was. No part ends a later one: each is a process of its own with a limit, and its exit code,
seconds and the end of its output are noted. --out holds at most 8 files of at most 16 MiB: acceptance.json (machine,
parts), rows.json (results, also unfinished ones: `scripts/reproduce --add` takes them over), benchmarks.json, log.txt
(the end of each part's output). Checkpoints stay in --work, which has to outlive the sitting. One process at a time has
--work, and one --out (its lock is a file beside that folder).

The machine needs no network, no Ray and no simulation extra of Flower: rows run with grid=in_process. It needs Python
3.11 or newer and, beside torch, torchvision and numpy, the modules that `missing` in acceptance.json would name. On one
that has the usual scientific packages (grpcio, httpx, jaxtyping, jinja2, matplotlib, numba, packaging, pandas, pillow,
pyarrow, pyyaml, rich, safetensors, scikit-learn, scipy, tensorboard, typer, pytest, pytest-timeout, hypothesis) and
nothing of ours, carry these wheels, 11 MB for Python 3.12 on x86-64 (measured; cryptography and pycryptodome are 8):
  flwr 1.42 (the plain package), hydra-core 1.3, omegaconf<2.4, antlr4-python3-runtime 4.9.3 (only a source: pip wheel),
  protobuf<7 (for flwr; grpcio-health-checking, which only Flower's servers import, would have to be <1.82 with it),
  cryptography, cffi, pycparser, pycryptodome, iterators; for the tests also beartype
fetched by `pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64
--platform manylinux2014_x86_64 -d wheels NAME` and installed there by
`pip install --no-index --no-deps --target site wheels/*.whl`, with PYTHONPATH=site. fedssl itself is not installed.
Exit codes: 0 every part ended well or ran out of time; 1 one did not; 2 bad input; 130 interrupted, by SIGTERM too.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import rows
from bench.rows import load_table, read_results

from fedssl.errors import ConfigError
from fedssl.lock import held

SCRIPTS = Path(__file__).resolve().parents[1]
PARTS = ("tests", "benchmarks", "rows")
# Shortest first. The others measure the CPU only, or, flesd, against it; `compiled` takes longer than a sitting.
BENCHMARKS = ("probe", "views", "packed", "train")
SHARES = {"tests": 0.25, "benchmarks": 0.5}  # at most so much of what is left, if another part follows
STOPPED = 4  # of scripts/reproduce
LAST = 20.0  # seconds before the end in which a row is asked to stop, and then killed
INTERRUPTED = 130
REFRESH = 10.0  # seconds after which --out is written again while a part runs: whatever ends this process, it is there
MORE = 1.1  # times the seconds that were not enough are worth another try
GRACE = 10.0  # seconds in which an interrupted part may write what it has
NEEDED = {  # module -> package, for whom
    "torch": "torch: rows, tests",
    "numpy": "numpy: rows, tests",
    "flwr": "flwr: rows, tests",
    "hydra": "hydra-core: rows, tests",
    "omegaconf": "omegaconf<2.4: rows, tests",
    "antlr4": "antlr4-python3-runtime==4.9.3: rows, tests",
    "grpc": "grpcio: flwr",
    "cryptography": "cryptography: flwr",
    "_cffi_backend": "cffi: flwr",
    "httpx": "httpx: flwr",
    "typer": "typer: flwr",
    "packaging": "packaging: flwr",
    "Crypto": "pycryptodome: flwr",
    "iterators": "iterators: flwr",
    "jaxtyping": "jaxtyping: rows, tests",
    "google.protobuf": "protobuf<7: flwr",
    "sklearn": "scikit-learn: rows, tests",
    "PIL": "pillow: rows, tests",
    "scipy": "scipy: tests",
    "pandas": "pandas: tests",
    "matplotlib": "matplotlib: tests",
    "jinja2": "jinja2: tests",
    "markupsafe": "markupsafe: tests",
    "pyarrow": "pyarrow: rows with parquet files",
    "rich": "rich: rows",
    "numba": "numba: tests, rows on the CPU",
    "safetensors": "safetensors: rows",
    "tensorboard": "tensorboard: rows",
    "torchvision": "torchvision: rows",
    "triton": "triton, which comes with torch on Linux: rows (slower without)",
    "yaml": "pyyaml: rows",
    "pytest": "pytest: tests",
    "pytest_timeout": "pytest-timeout: tests",
    "beartype": "beartype: tests",
    "hypothesis": "hypothesis: tests",
}
STATE = {"tests": ("of", "part"), "futile": ("of", "seconds")}  # what acceptance.json keeps, and its keys
TAIL = 8_000  # characters of each part's output that are kept
MAX_LOG = 16 * 2**20


@dataclass(kw_only=True)
class Part:
    """How one process ended."""

    name: str
    command: list[str]
    code: int | None  # None: it was killed at its limit
    interrupted: bool  # whether its limit came first
    seconds: float
    tail: str
    earlier: bool = False  # of an earlier sitting, with the same code on the same machine

    @property
    def went_well(self) -> bool:
        """It ended by itself, or at its limit; a row may also stop for lack of time (to pytest, 4 is an error)."""
        return self.interrupted or self.code == 0 or (self.code == STOPPED and self.name.startswith("row "))


def missing() -> list[str]:
    """Packages that are not there, with what needs them."""
    return [text for module, text in NEEDED.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def code_digest() -> str:
    """sha256 of the code and settings: a commit says nothing of what was changed since, or where git is missing."""
    sha256 = hashlib.sha256()
    for folder in ("fedssl", "strategies", "conf", "tests", "scripts"):
        for path in sorted((rows.ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".j2", "") and path.is_file():
                sha256.update(f"{path.relative_to(rows.ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sha256.hexdigest()


def machine() -> dict[str, Any]:
    """Hardware, versions, and what is missing; whatever cannot be found out is named instead."""
    found: dict[str, Any] = {"missing": missing(), "python": sys.version.split()[0]}
    try:
        from fedssl import tracking

        found |= {
            key: value
            for key, value in tracking.manifest({}, data={}).items()
            if key in ("started", "versions", "git", "hardware")
        }
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


DIES_WITH_US = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
"""PR_SET_PDEATHSIG of prctl(2): a part that outlives a killed sitting would hold its row, and the GPU."""


def run(
    name: str, command: Sequence[str], limit: float, log: Path, meanwhile: Callable[[], None] = lambda: None
) -> Part:
    """One process; at its limit it is interrupted, so that it can write what it has, and then killed.

    Args:
        name: of the part.
        command: what runs.
        limit: seconds.
        log: where its output goes.
        meanwhile: called every `REFRESH` seconds.
    """
    started = time.monotonic()
    bound = [sys.executable, "-c", DIES_WITH_US, *command] if sys.platform == "linux" else command
    with log.open("wb") as out:
        process = subprocess.Popen(
            bound, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=rows.ROOT, env=_environment()
        )
        code: int | None = None
        interrupted = False
        try:
            code = _ended(process, started + max(1.0, limit - LAST), meanwhile)
        except subprocess.TimeoutExpired:
            interrupted = True
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(LAST)
        except KeyboardInterrupt:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise
        finally:
            _signal(process, signal.SIGKILL)  # what it has started, too
            process.wait()
    tail = log.read_text(errors="replace")[-TAIL:]
    seconds = time.monotonic() - started
    return Part(name=name, command=list(command), code=code, interrupted=interrupted, seconds=seconds, tail=tail)


def _ended(process: "subprocess.Popen[bytes]", deadline: float, meanwhile: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(max(0.0, min(REFRESH, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
            meanwhile()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _environment() -> dict[str, str]:
    paths = [str(rows.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class Acceptance:
    """One sitting.

    Args:
        args: as parsed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.table = load_table(args.rows)
        self.names = args.names.split(",") if args.names else list(self.table.rows)
        for name in self.names:
            self.table.row(name)  # refuses one that there is not
        self.deadline = time.monotonic() + args.seconds
        self.parts: list[Part] = []
        self.results = args.work / "results"
        self.results.mkdir(exist_ok=True)
        self.machine = machine()
        self.bring_back()
        hardware = self.machine.get("hardware") or {}
        described = [hardware.get("cpu"), hardware.get("gpus"), self.machine["python"], self.machine.get("versions")]
        self.tested = {"code": code_digest(), "machine": described, "dry": args.dry}
        noted = self.state("futile.json", *STATE["futile"])
        self.futile: dict[str, float] = {}  # by part: the most seconds that were not enough
        if noted and noted["of"] == json.loads(json.dumps(self.tested)):
            self.futile = noted["seconds"]
        self.tests_before()
        self.benchmark_results()
        read_results(self.table, self.results)  # what is damaged is named before anything runs

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def share(self, part: str) -> float:
        """Seconds for a part: all that is left to the last one."""
        followed = any(later in self.args.parts for later in PARTS[PARTS.index(part) + 1 :])
        return (SHARES[part] if followed else 1.0) * self.left

    def state(self, name: str, *needed: str) -> dict[str, Any]:
        """What an earlier sitting, or this one, noted in a file of --work; {} where it did not.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.results / name
        found = rows.read_json(path) if path.is_file() else {}
        if path.is_file() and not _has(found, needed):
            raise ConfigError(f"{path} must have {', '.join(needed)}, as gpu_acceptance writes it. Delete it.")
        return dict(found)

    def benchmark_results(self) -> dict[str, dict[str, Any]]:
        """By the stems of their files."""
        names = [path.name for path in sorted(self.results.glob("benchmark-*.json"))]
        return {Path(name).stem: self.state(name, "name", "figures") for name in names}

    def worth(self, name: str, limit: float) -> bool:
        """Whether the part may end within the limit; said where it may not."""
        if (known := self.futile.get(name, 0.0)) and limit < MORE * known:
            print(f"{name}: passed over, {known:.0f} s were not enough and {limit:.0f} s are left for it", flush=True)
            return False
        return True

    def bring_back(self) -> None:
        """What an earlier sitting left in --out is kept where --work has less, and not measured again.

        What is of no row and of no benchmark, or damaged, is passed over, and said.
        """
        for name, result in _left(path := self.args.out / "rows.json").items():
            try:
                if name not in self.table.files:
                    raise ConfigError(f"{path} has {name!r}, which is of no row")
                brought = rows.checked(result, f"{name} in {path}")
            except ConfigError as error:
                print(f"passed over: {error}", flush=True)
            else:
                self.keep_better(name, brought)
        noted = _left(self.args.out / "acceptance.json")
        left = {
            **{f"{name}.json": (noted.get(name), needed) for name, needed in STATE.items() if noted.get(name)},
            **{
                f"{stem}.json": (result, ("name", "figures"))
                for stem, result in _left(self.args.out / "benchmarks.json").items()
            },
        }
        for name, (content, needed) in left.items():
            if not (re.fullmatch(r"(benchmark-\w+|tests|futile)\.json", name) and _has(content, needed)):
                print(f"passed over: {self.args.out} has {name!r}, which is damaged, or none of its own", flush=True)
            elif not (kept := self.results / name).exists():
                _write(kept, json.dumps(content, indent=2))

    def keep_better(self, name: str, result: dict[str, Any] | None) -> None:
        """Put the result into --work where none is, or one with fewer complete runs.

        One of other settings, from which nothing of the row can go on, is set aside.
        """
        kept = self.results / name
        own = read_results(self.table, self.results, names=[name]).get(name)
        if own and own.get("changed"):
            kept.replace(kept.with_suffix(".old"))
            own = None
        if result is None or result.get("changed"):
            return
        if own is None or rows.num_completed(result) > rows.num_completed(own):
            _write(kept, json.dumps(result, indent=2))

    def tests_before(self) -> dict[str, Any] | None:
        """How the tests ended last, and with what code on what machine."""
        return self.state("tests.json", *STATE["tests"]) or None

    def __call__(self) -> int:
        """All parts that were asked for; the exit code."""
        self.write()
        for part in PARTS:
            if part in self.args.parts:
                try:
                    getattr(self, part)()
                except Exception as error:  # a later part must have its turn
                    self.note(part, f"{type(error).__name__}: {error}")
        return int(any(not part.went_well for part in self.parts))

    def tests(self) -> None:
        """`pytest -m gpu`; in a rehearsal they are only collected, as they need a GPU."""
        if (before := self.tests_before()) and before["of"] == json.loads(json.dumps(self.tested)):
            self.parts.append(Part(**{**before["part"], "earlier": True}))
            self.write()
            return
        if lacking := [text for text in self.machine["missing"] if "tests" in text or "flwr" in text]:
            self.note("tests", f"cannot run without {', '.join(lacking)}")
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors"]  # a module may need a package that is not there
        limit = self.share("tests")
        if not self.worth("tests", limit):
            return
        self.run("tests", [*command, *(["--collect-only"] if self.args.dry else [])], limit)
        if self.parts[-1].interrupted:
            self.remember("tests", limit)
        if not (part := self.parts[-1]).interrupted:
            _write(self.results / "tests.json", json.dumps({"of": self.tested, "part": asdict(part)}, indent=2))
            self.write()

    def benchmarks(self) -> None:
        """Those that say something here and have no result yet, within their share of the time."""
        until = time.monotonic() + self.share("benchmarks")
        usual = [name for name in BENCHMARKS if not (self.args.dry and name == "packed")]  # which needs a GPU
        names = self.args.benchmarks.split(",") if self.args.benchmarks else usual
        for name in sorted(names, key=lambda name: self.futile.get(f"benchmark {name}", 0.0)):
            there = (SCRIPTS / "bench" / f"{name}.py").is_file()
            kept = self.results / f"benchmark-{name}.json"
            before = self.state(kept.name, "name", "figures") or None
            done = before is not None and not before["figures"].get("not_measured")
            limit = until - time.monotonic()
            if there and not done and limit > LAST and self.worth(f"benchmark {name}", limit):
                command = [sys.executable, str(SCRIPTS / "benchmark.py"), name]
                if before is not None:
                    command += ["--of", ",".join(before["figures"]["not_measured"])]
                log = self.run(f"benchmark {name}", command, limit)
                ended = not self.parts[-1].interrupted
                if (result := _result(log.read_text())) is not None:
                    _write(kept, json.dumps(_joined(before, result), indent=2))
                    ended = True
                if not ended:
                    self.remember(f"benchmark {name}", limit)
                self.write()

    def rows(self) -> None:
        """The next ones without a result, in the table's order, until the time is up; one that fails is passed over.

        So are those on the same data as one whose images could not be read: each would take seconds to say so.
        """
        unread: dict[tuple[str, ...], str] = {}
        for name in self.names:
            row = self.table.row(name)
            given = self.table.overrides(row, shrunken=self.args.dry)
            data = tuple(override for override in given if override.startswith(("experiment=", "data=")))
            if data in unread:
                print(f"row {name}: passed over, has the images of {unread[data]}, which were not read", flush=True)
                continue
            file = row.file(self.args.dry)
            folders = [*([] if self.args.dry else [rows.RESULTS]), self.results]
            best = read_results(self.table, *folders, names=[file]).get(file)
            if rows.is_measured(best):
                continue
            if self.left < 2 * LAST:
                return
            kept = self.results / file
            self.keep_better(file, best)  # runs of it that are complete are not made again
            command = [sys.executable, str(SCRIPTS / "reproduce"), name, "--rows", str(self.args.rows.resolve())]
            command += ["--work", str(self.args.work.resolve()), "--seconds", str(round(self.left - 2 * LAST, 1))]
            command += ["-o", str(kept.resolve())]
            command += ["--data", str(Path(self.args.data).resolve())] if self.args.data else []
            self.run(f"row {name}", [*command, *(["--cpu"] if self.args.dry else [])], self.left)
            if rows.ROOT_IS_DATA in self.parts[-1].tail:
                unread[data] = name

    def run(self, name: str, command: Sequence[str], limit: float) -> Path:
        """One process, noted; its output."""
        print(f"{name}: at most {limit:.0f} s of {self.left:.0f} s left", flush=True)
        log = self.args.work / f"{name.replace(' ', '-')}.log"
        started = time.monotonic()
        try:
            part = run(name, command, limit, log, self.write)
        except KeyboardInterrupt:
            seconds, tail = time.monotonic() - started, log.read_text(errors="replace")[-TAIL:]
            self.parts.append(
                Part(name=name, command=list(command), code=None, interrupted=True, seconds=seconds, tail=tail)
            )
            raise
        self.parts.append(part)
        why = "" if part.went_well else f", {(part.tail.strip().splitlines() or ['no output'])[-1]}"
        print(f"{name}: exit code {part.code}{' at its limit' if part.interrupted else ''}{why}", flush=True)
        self.write()
        return log

    def remember(self, name: str, limit: float) -> None:
        """What was not enough for a part."""
        self.futile[name] = limit
        _write(self.results / "futile.json", json.dumps({"of": self.tested, "seconds": self.futile}, indent=2))
        self.write()

    def note(self, name: str, text: str) -> None:
        """A part that did not come to be."""
        print(f"{name}: {text}", flush=True)
        self.parts.append(Part(name=name, command=[], code=2, interrupted=False, seconds=0.0, tail=text))
        self.write()

    def write(self) -> None:
        """The small files, after every part: whatever ends this process, they are there."""
        out = self.args.out
        described = [{key: value for key, value in asdict(part).items() if key != "tail"} for part in self.parts]
        left = {"dry": self.args.dry, "machine": self.machine, "parts": described, "tests": self.tests_before()}
        left["futile"] = {"of": self.tested, "seconds": self.futile}
        _write(out / "acceptance.json", json.dumps(left, indent=2))
        _write(out / "rows.json", json.dumps(read_results(self.table, self.results), indent=2))
        _write(out / "benchmarks.json", json.dumps(self.benchmark_results(), indent=2))
        text = "\n".join(f"== {part.name}\n{part.tail}" for part in self.parts)
        _write(out / "log.txt", text[-MAX_LOG // 4 :])  # a character has at most 4 bytes


def _result(output: str) -> dict[str, Any] | None:
    """The object that a benchmark printed, among what else was said; None if it did not get to it."""
    for line in re.finditer(r"^\{", output, re.MULTILINE):
        with contextlib.suppress(ValueError):
            found = json.JSONDecoder().raw_decode(output, line.start())[0]
            if found.keys() >= {"name", "figures"}:
                return dict(found)
    return None


def _joined(before: dict[str, Any] | None, result: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the families that an interrupted `train` had left, beside what it had; the later machine."""
    if before is None:
        return result
    families = {**before["figures"]["families"], **result["figures"]["families"]}
    figures = {**result["figures"], "families": families}
    return {**result, "figures": figures, "bars": [*before["bars"], *result["bars"]]}


def _has(node: Any, needed: Sequence[str]) -> bool:
    """Whether it is a mapping with these keys, of which all but the name and what it is of are mappings."""
    return isinstance(node, dict) and all(
        key in node and (key in ("name", "of") or isinstance(node[key], dict)) for key in needed
    )


def _left(path: Path) -> dict[str, Any]:
    """What an earlier sitting wrote there, if anything."""
    found = rows.read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a mapping, as gpu_acceptance writes it. Delete it, or bring it back.")
    return found


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540.0, metavar="S", help="for everything (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--data", metavar="DIR", help="data.root of the rows")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_acceptance/out"), metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/gpu_acceptance/work"), metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="(%(default)s)")
    parser.add_argument("--names", metavar="A,B", help="rows (default: all, in order)")
    parser.add_argument("--benchmarks", metavar="A,B", help=f"(default: {','.join(BENCHMARKS)})")
    parser.add_argument("--rows", type=Path, default=rows.ROWS, metavar="FILE", help="(benchmarks/rows.yaml)")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    there = sorted(path.stem for path in (SCRIPTS / "bench").glob("*.py"))
    if unknown := set(args.benchmarks.split(",") if args.benchmarks else ()) - set(there):
        parser.error(f"--benchmarks has {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if args.data and not Path(args.data).is_dir():
        parser.error(f"--data is to be the folder that holds the data sets, and {args.data} is none")
    if not args.seconds > 0:
        parser.error(f"--seconds must be above 0, got {args.seconds}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parse(argv)
    try:
        for option, folder in (("--out", args.out), ("--work", args.work)):
            rows.make_folder(folder, option)
        out = args.out.resolve()
        advice = "wait until it has ended, or name another folder"
        with (
            held(args.work, f"--work {args.work}", advice),
            held(out.parent, f"--out {args.out}", advice, name=f".{out.name}.lock"),  # beside it: a kill leaves it
        ):
            # Imported now, because an interrupt in the midst of it is another error.
            with contextlib.suppress(ModuleNotFoundError):
                import fedssl.config  # noqa: F401
            acceptance = Acceptance(args)
            try:
                return acceptance()
            except KeyboardInterrupt:
                acceptance.write()
                return INTERRUPTED
    except ValueError as error:  # a ConfigError is one, and fedssl may not be importable
        print(f"error: {error}", file=sys.stderr)
        return 2
