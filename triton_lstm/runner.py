"""Runs cases in worker processes, and kills a process whose case takes too long. Knows neither torch nor what a case
is.

A worker writes {"ready": true}, then reads one case per line and answers each with a line of JSON. After a worker that
died, was killed or answered "fatal", a new one starts.
"""
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator


def serve(answer):
    """Be a worker: send back ``answer`` of each line of standard input, as JSON, or each answer where it is an iterator
    of several. Everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    say = lambda found: print(json.dumps(found), file=answers, flush=True)
    say(dict(ready=True))
    for line in sys.stdin:
        found = answer(line)
        for each in found if isinstance(found, Iterator) else [found]:
            say(each)


class Worker:
    """A worker process, started by ``command``."""

    def __init__(self, command, environment):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                         env=environment, start_new_session=True)
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector, self._buffer = selectors.DefaultSelector(), b""
        self._selector.register(self._stdout, selectors.EVENT_READ)

    def answer(self, seconds):
        """The next line of JSON; None if none comes in time. EOFError with its last words if the worker has ended."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                return None
            data = os.read(self._stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError(self._last_words())
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def ask(self, line):
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:         # ``answer`` tells why
            pass

    def _last_words(self):
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"{how}: {lines[-1][:500]}" if lines else how

    def kill(self):
        """End the process and those that it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        for file in (self._stdin, self._stdout, self._selector, self._errors):
            try:
                file.close()
            except BrokenPipeError:
                pass


def run(cases, command, seconds, share, environment=None, start=60., clock=time.monotonic):
    """Yield (case, outcome, seconds) of each of ``cases``, which are pairs (any object, line), in order.

    seconds  for all cases; those that are then left are "not reached"
    share    seconds for one case
    start    seconds that a worker may take to be ready

    The outcome is what the worker answers, or a dict with "outcome" "hung" or "died" and a message.
    """
    end, worker = clock() + seconds, None
    try:
        for case, line in cases:
            if clock() >= end:
                yield case, dict(outcome="not reached"), 0.
                continue
            began, found = clock(), None
            try:
                if worker is None:
                    worker = Worker(command, environment)
                    if worker.answer(min(start, end - clock())) is None:
                        found = dict(outcome="hung", message="the worker did not start in time")
                    began = clock()
                if found is None:
                    worker.ask(line)
                    allowed = min(share, end - clock())
                    found = worker.answer(allowed)
                    if found is None:
                        found = (dict(outcome="hung", message=f"no answer in {allowed:.1f} s") if allowed >= share else
                                 dict(outcome="not reached"))
                        worker.kill()
                        worker = None
                elif worker:
                    worker.kill()
                    worker = None
            except EOFError as error:
                found = dict(outcome="died", message=str(error))
                if worker:
                    worker.kill()
                worker = None
            if found.pop("fatal", False) and worker:
                worker.kill()
                worker = None
            yield case, found, clock() - began
    finally:
        if worker:
            worker.kill()
