"""Which column of a site's policy tensor means what.

A policy tensor is float32 `[Hq, COLUMNS]`, one row a query head. It is an input of the compiled
graph, never a constant, so a changed threshold changes the output without a recompile.
"""

MODE = 0  # one of DENSE, SPARSE, WINDOWED
TAU = 1  # cumulative pooled mass kept, in [0, 1]
THETA = 2  # self-similarity gate of selector `mean`, in [-1, 1]; -1 is off
LAMBDA = 3  # PV skip, log2 units, below 0; -inf and 0 are off; read by the Gluon forward
WINDOW = 4  # keys a query of a windowed head sees, itself included
SINK = 5  # tokens at the start that are always visible
NEIGHBOURS = 6  # key blocks before the diagonal that are always kept
BUDGET = 7  # share of the visible blocks kept, in (0, 1], in place of tau; 0 is off
COLUMNS = 8

DENSE = 0.0
SPARSE = 1.0
WINDOWED = 2.0
