"""How long `layerswap --help` takes, against an interpreter that does nothing.

    python benchmarks/startup.py [RUNS]

Goal: at most 15 times `python -c pass`. The two run alternately in subprocesses, so that a busy
spell of the machine hits both; medians and minima of wall-clock time, and their ratios.
`import layerswap` is measured beside them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from machine import describe

GOAL = 15
BASELINE = "python -c pass"
COMMANDS = {
    BASELINE: [sys.executable, "-c", "pass"],
    "import layerswap": [sys.executable, "-c", "import layerswap"],
    "layerswap --help": [sys.executable, "-m", "layerswap", "--help"],
}


def measure(runs: int) -> dict[str, list[float]]:
    """Seconds of every command, `runs` times, alternating; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(runs + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if run:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(runs: int) -> None:
    """Prints the table and the machine's state."""
    seconds = measure(runs)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    print(f"{'':<18} {'median':>9} {'ratio':>6} {'minimum':>9} {'ratio':>6}   ({runs} runs)")
    for name in COMMANDS:
        print(
            f"{name:<18} {median[name] * 1e3:>6.1f} ms {median[name] / median[BASELINE]:>6.1f} "
            f"{least[name] * 1e3:>6.1f} ms {least[name] / least[BASELINE]:>6.1f}"
        )
    ratio = median["layerswap --help"] / median[BASELINE]
    verdict = "met" if ratio <= GOAL else "missed"
    print(f"goal: layerswap --help within {GOAL} times {BASELINE}: {verdict} ({ratio:.1f})\n")
    print(describe())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 21)
