"""A request to stop, as a flag that the loop looks at between steps: the run saves and ends, and the same command goes on."""

import os
import signal
import types
from pathlib import Path

REQUEST = "stop_request"
"""A file of this name in output.dir asks the run to stop: how a queue's batch script reaches runs on other nodes."""


class StopRequest:
    """Set by SIGTERM (a queue's or a launcher's), SIGUSR1 (a queue's warning) and SIGINT (Ctrl-C), by a file `stop_request` in the
    run's folder (which may say why), and by the death of `accelerate launch`, which does not always pass a signal on. A second Ctrl-C
    ends the run at once, unsaved.

    A second SIGTERM changes nothing: launchers and queues deliver one preemption several times. SIGUSR1 is meant for the batch shell
    (slurm/train.sbatch), but `--signal` without its B: and `scancel -s USR1` send it here, where by default it would be the end.
    """

    def __init__(self, folder: Path) -> None:
        self.reason: str | None = None
        self._interrupted = False
        self.file = folder / REQUEST
        # Only under the launcher, which sets this: a run started by hand may well outlive its shell.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def asked(self) -> bool:
        """Should the run end at the next step?"""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.reason = self.reason or "the launcher is gone"
        if self.reason is None and self.file.exists():
            self.reason = f"the file {self.file.name}"
        return self.reason is not None

    def honoured(self) -> None:
        """The run is saved and ends: the next attempt must not find the same request again."""
        self.file.unlink(missing_ok=True)

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True  # also after another request: the next Ctrl-C must be able to end the run
        if self.reason is None:
            self.reason = signal.Signals(number).name
            os.write(2, f"\n{self.reason}: saving after this step; wait for the word `stopped`\n".encode())  # print is not safe here
