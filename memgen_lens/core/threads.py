"""How torch's threads wait for each other, chosen before torch is loaded.

Does not know torch, and sets no number of threads.
"""

import os
import sys

SPINS = 1000
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_briefly() -> None:
    """Let threads that wait sleep after a short spin, so that a busy neighbour on the machine costs what it takes.

    torch on Linux brings GNU's OpenMP (libgomp), whose threads by default spin 300,000 times before they sleep. On a
    machine that does something else beside, they spin against the very thread they wait for, and a training step takes
    several times as long. ``GOMP_SPINCOUNT=1000`` costs about a tenth on an idle machine; ``OMP_WAIT_POLICY=PASSIVE``,
    which does not spin at all, costs several times that (benchmarks/README.md).

    libgomp reads the environment once, when it is loaded, and scikit-learn's own copy does likewise. So nothing is done
    where torch is loaded already, where the user has set a policy (any of `USERS_OWN` stands, an empty one too), or
    where torch brings another OpenMP (macOS, Windows). Processes that this one starts inherit the setting.
    """
    if sys.platform == "linux" and "torch" not in sys.modules and not any(name in os.environ for name in USERS_OWN):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
