"""The parent's side: processes that take turns, and the GPU memory that is kept from them (standard library only)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "@rivals "
SCRIPT = Path(__file__).parents[1] / "offload_rivals.py"


@dataclass
class Record:
    """What one contestant did at one number of micro-batches."""

    name: str
    micro_batches: int
    seconds: list[float] = field(default_factory=list)
    """Of a step, for each round: the mean of its turn."""
    losses: list[float] = field(default_factory=list)
    """Of the first round's steps, from the first one on."""
    update: list[dict[str, float]] = field(default_factory=list)
    """:func:`rivals.contestant.after_release` of each timed step, where the contestant is this project's."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Parameters, memory, placement."""
    failed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return dict(self.__dict__)


class Contestant:
    """A contestant's process."""

    def __init__(self, order: Any, timeout: float) -> None:
        self.order, self.timeout = order, timeout
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Build it; parameters and seconds, or ``failed`` and why."""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--contestant", self.order.dump()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        return self._answer()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; the answer says how
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line that is one; what ends without it has failed."""
        import threading

        assert self.process is not None and self.process.stdout is not None
        late = threading.Timer(self.timeout, self.process.kill)
        late.start()
        try:
            for line in self.process.stdout:
                if line.startswith(MARK):
                    found: dict[str, Any] = json.loads(line[len(MARK) :])
                    return found
        finally:
            expired = not late.is_alive()
            late.cancel()
        code = self.process.wait()
        if expired:
            return {"failed": f"no answer within {self.timeout:g} s"}
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return {"failed": f"ended with {code}: {lines[-1] if lines else 'no message'}"}

    def close(self) -> None:
        """End it."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.process = None


class Ballast:
    """GPU memory held by a process that does nothing else, so that every contestant finds a smaller GPU."""

    HOLD = (
        "import sys, torch\n"
        "held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda')\n"
        "torch.cuda.synchronize()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )

    def __init__(self, size: float) -> None:
        """Nothing is held before :meth:`set`.

        Args:
            size: bytes.
        """
        self.size = size
        self._process: subprocess.Popen[str] | None = None

    def set(self, wanted: bool) -> None:
        """Hold the memory, or let go of it."""
        if wanted and self._process is None and self.size > 0:
            command = [sys.executable, "-c", self.HOLD, str(int(self.size))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            if self._process.stdout.readline().strip() != "held":
                sys.exit(f"{self.size / 1e9:.1f} GB of GPU memory could not be held back: is the GPU in use?")
        elif not wanted and self._process is not None:
            self._process.communicate()
            self._process = None


class Turns:
    """Rounds over all contestants."""

    def __init__(self, orders: list[Any], options: Any, ballast: Ballast) -> None:
        """Nothing is started yet.

        Args:
            orders: one for each contestant and number of micro-batches.
            options: rounds, steps, warm, keep, timeout and output of the command line.
            ballast: what is held while anyone but none trains.
        """
        self.options, self.ballast = options, ballast
        self.overlap: dict[str, Any] | None = None
        """What the trace of a streamed step shows, if streamed took part."""
        self.contestants = [Contestant(order, options.timeout) for order in orders]
        self.records = [Record(order.name, order.micro_batches) for order in orders]

    def run(self) -> list[Record]:
        """All rounds, beginning each with another contestant."""
        pairs = list(zip(self.contestants, self.records, strict=True))
        try:
            for number in range(self.options.rounds):
                first = number % len(pairs)
                for contestant, record in pairs[first:] + pairs[:first]:
                    if record.failed is None:
                        self._turn(contestant, record, number)
            streamed = [contestant for contestant, record in pairs if record.name == "streamed" and not record.failed]
            if streamed:
                self.overlap = self._trace(streamed[0])
        finally:
            for contestant in self.contestants:
                contestant.close()
            self.ballast.set(False)
        return self.records

    def _turn(self, contestant: Contestant, record: Record, number: int) -> None:
        self.ballast.set(record.name != "none")
        answer: dict[str, Any] = {}
        if contestant.process is None:
            answer = contestant.start()
            record.facts |= {key: answer[key] for key in ("parameters",) if key in answer}
            if "failed" not in answer:
                answer = contestant.ask("steps", count=self.options.warm)
                record.losses += answer.get("losses", []) if number == 0 else []
        if "failed" not in answer:
            answer = contestant.ask("steps", count=self.options.steps)
        if "failed" in answer:
            record.failed = answer["failed"]
            contestant.close()
        else:
            self._note(record, answer, number)
        if not self.options.keep:
            contestant.close()
        self._say(record, number)

    def _trace(self, contestant: Contestant) -> dict[str, Any]:
        """One step under the profiler."""
        answer: dict[str, Any] = {}
        if contestant.process is None:
            self.ballast.set(True)
            answer = contestant.start()
            if "failed" not in answer:
                answer = contestant.ask("steps", count=self.options.warm)
        path = self.options.output.resolve() / "streamed.trace.json"
        return answer if "failed" in answer else contestant.ask("trace", path=str(path))

    def _note(self, record: Record, answer: dict[str, Any], number: int) -> None:
        record.seconds.append(answer["seconds"])
        record.update += answer.get("update", [])
        record.losses += answer["losses"] if number == 0 else []
        record.facts |= {key: answer[key] for key in ("placement", "traffic") if key in answer}
        for name in ("gpu_bytes", "resident_bytes", "host_bytes"):
            record.facts[name] = max(answer[name], record.facts.get(name, 0.0))

    def _say(self, record: Record, number: int) -> None:
        what = record.failed or f"{record.seconds[-1]:.3f} s"
        print(f"round {number + 1}: {record.name}, {record.micro_batches} micro-batches: {what}", flush=True)
