"""The embedded Runge-Kutta pair 5(4) of Dormand & Prince 1980, table 2 (RK5(4)7M); its last slope opens the next step.

For x' = f(phi, x): k_0 = f(phi, x), k_i = f(phi + NODES_i h, x + h sum_j STAGES_ij k_j), the last x of these the
answer, of order 5, and h sum_j ERROR_j k_j what it differs by from order 4.
"""

from __future__ import annotations

DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DOPRI5_MATRIX = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR_WEIGHTS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
