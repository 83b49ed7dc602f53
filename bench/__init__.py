"""What ebfw costs, measured on the machine at hand: `make bench`, or `python -m bench` as root.

In: nothing but the machine. Out: one table, and the same rows as JSON lines. Every row that has a bound is a ratio
inside one run, both sides interleaved, so that machines and noisy neighbours can be compared. Not its job: whether
what is measured is right; the tests say that.
"""
