"""The driver's side of a worker: starts it, asks it, ends it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A request failed inside a worker."""


class Worker:
    """Runs `worker.py` in a process that sees one package called `sirfshampoo`."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        device: str = "cpu",
        package: str = "sirfshampoo",
    ) -> None:
        """Start the process.

        Args:
            folder: Where it finds what it measures, before all other places.
            threads: How many threads it uses.
            device: Where its tensors are.
            package: The import name of what it measures.
        """
        script = Path(__file__).with_name("worker.py")
        places = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
        path = {"PYTHONPATH": places, "OMP_NUM_THREADS": str(threads)}
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            env=os.environ | path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        try:
            hello = self.ask("hello", threads=threads, device=device)
            self.versions = hello["versions"]
            origin = Path(self.ask("origin", package=package)).resolve()
            if folder.resolve() not in origin.parents:
                raise WorkerError(f"{package} was imported from elsewhere.")
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request; wait for its answer.

        Raises:
            WorkerError: If the request raised, or the process ended.
        """
        channel_in, channel_out = self._process.stdin, self._process.stdout
        if channel_in is None or channel_out is None:
            raise WorkerError("The worker has no pipes.")
        try:
            channel_in.write(json.dumps({"do": do, **arguments}) + "\n")
            channel_in.flush()
            line = channel_out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._stderr.seek(0)
            raise WorkerError(f"The worker ended. {self._stderr.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._stderr.close()
