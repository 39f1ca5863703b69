"""A request to stop, as a flag that the loop looks at between steps: the run saves and ends, and the same command goes on."""

import os
import signal
import types


class StopRequest:
    """Set by SIGTERM (a queue's or a launcher's) and SIGINT (Ctrl-C), and by the death of `accelerate launch`, which does not
    always pass a signal on. A second Ctrl-C ends the run at once, unsaved.

    A second SIGTERM changes nothing: launchers and queues deliver one preemption several times.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        # Only under the launcher, which sets this: a run started by hand may well outlive its shell.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def asked(self) -> bool:
        """Should the run end at the next step?"""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.reason = self.reason or "the launcher is gone"
        return self.reason is not None

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        if self.reason is None:
            self.reason = signal.Signals(number).name
            os.write(2, f"\n{self.reason}: saving after this step; wait for the word `stopped`\n".encode())  # print is not safe here
