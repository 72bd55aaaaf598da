"""Fuzzing of everything that reads bytes from outside: `python -m tests.fuzz TARGET`.

A case is a function of its target and one integer: a valid input, changed where its structure says
that a change is worth trying. We read it, a reference reader reads it, and a judge compares:
whatever the reference refuses we refuse, what both accept is equal, and nothing but the promised
errors ever escapes. Cases run in worker processes, so that a signal, a hang or a flood of memory is
a finding with a number, not the end of the run.

`case.py` has the judge, `worker.py` and `watch.py` the two ends of a process, and each of the other
files a target.
"""
