"""Stage 2: whether all is right on the device, by checks and by the suite's own tests.

The groups run side by side: a hang of one costs nobody else's time.
"""

import json
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Timer
from time import perf_counter
from typing import Any

from benchmarks.environment import ROOT, cores
from benchmarks.gpu import driver
from benchmarks.gpu.checks.__main__ import GROUPS
from benchmarks.gpu.visit import Visit

PHRASE = "needs a GPU"  # what tests say that skip themselves
MARGIN = 3.0  # seconds to write down what was cut


def start(*command: str, seconds: float) -> tuple[subprocess.Popen[str], Timer]:
    """Start Python, which is killed with all that it started if it takes longer."""
    process = driver.start(*command)
    timer = Timer(max(seconds, 0.1), driver.kill, (process,))
    timer.start()
    return process, timer


class Groups:
    """The outcomes of all groups, written down as they come."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.lock = visit, Lock()
        self.outcomes: list[dict[str, Any]] = []

    def add(self, group: str, outcome: dict[str, Any]) -> None:
        """Take note of an outcome."""
        with self.lock:
            self.outcomes.append({"group": group, **outcome})
            counts = dict(Counter(o["status"] for o in self.outcomes))
            self.visit.save(counts=counts, checks=self.outcomes)

    def run(self, group: str) -> None:
        """Run the checks of a group in a process."""
        tiny = ["tiny"] if self.visit.tiny else []
        command = ("-m", "benchmarks.gpu.checks", group, self.visit.device, *tiny)
        process, timer = start(*command, seconds=self.visit.left() - MARGIN)
        with tempfile.TemporaryFile("w+") as errors, ThreadPoolExecutor(1) as drain:
            read = drain.submit(lambda: errors.write(process.stderr.read()))
            expected: list[str] = ["(the list itself)"]
            for line in process.stdout:
                told = json.loads(line)
                if "checks" in told:
                    expected = told["checks"]
                else:
                    expected.remove(told["name"])
                    self.add(group, told)
            code = process.wait()
            timer.cancel()
            read.result()
            errors.seek(0)
            last = errors.read()[-600:].strip()
        cut = code == -signal.SIGKILL and self.visit.left() < 2 * MARGIN
        status = "not reached" if cut else "failed"
        for number, name in enumerate(expected if code else []):
            reason = f"the process ended with {code}: {last}"
            told = "time was up" if cut else reason if number == 0 else "after it"
            self.add(group, {"name": name, "status": status, "told": told})

    def tests(self, group: str = "tests") -> None:
        """Run the files of tests in which some skip themselves without a GPU."""
        files = sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / "tests").rglob("test_*.py")
            if PHRASE in path.read_text() and "benchmarks" not in path.parts
        )
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            options += ["-k", "gpu"] if self.visit.tiny else []
            begin = perf_counter()
            command = ("-m", "pytest", *options, *files)
            process, timer = start(*command, seconds=self.visit.left() - MARGIN)
            printed, errors = process.communicate()
            timer.cancel()
            if not report.exists():
                last = (printed + errors).strip()[-600:]
                code = process.returncode
                status = "not reached" if code == -signal.SIGKILL else "failed"
                told = f"pytest of {files} ended with {code}: {last}"
                self.add(group, {"name": "pytest", "status": status, "told": told})
                return
            for outcome in outcomes(report):
                self.add(group, outcome)
            seconds = round(perf_counter() - begin, 1)
            self.visit.save(tests={"files": files, "seconds": seconds})


def outcomes(report: Path) -> list[dict[str, Any]]:
    """Read pytest's report: what failed or was skipped one by one, the rest as one."""
    found, passed = [], 0
    for case in ET.parse(report).iter("testcase"):
        bad = [e for e in case if e.tag in ("failure", "error")]
        skipped = case.find("skipped")
        told = {"name": case.get("name", "?")}
        if bad:
            message = (bad[0].get("message") or "")[:600]
            found.append(told | {"status": "failed", "told": message})
        elif skipped is not None:
            reason = skipped.get("message") or ""
            found.append(told | {"status": "not on this device", "told": reason})
        else:
            passed += 1
    kept = [o for o in found if o["status"] == "failed"]
    rest = [o for o in found if o["status"] != "failed"]
    if passed:
        kept.append({"name": f"{passed} tests", "status": "ok", "told": ""})
    if rest:
        told = rest[0]["told"]
        name = f"{len(rest)} tests"
        kept.append({"name": name, "status": "not on this device", "told": told})
    return kept


def run(visit: Visit) -> None:
    """Run all groups of checks and the tests."""
    groups = Groups(visit)
    # each compiles, waits or computes; a GPU's process also starts for seconds
    with ThreadPoolExecutor(max(2, min(cores(), len(GROUPS) + 1))) as pool:
        tests = pool.submit(groups.tests)
        for done in [pool.submit(groups.run, group) for group in GROUPS]:
            done.result()
        tests.result()
    failed = [o for o in groups.outcomes if o["status"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(groups.outcomes)} checks failed")
