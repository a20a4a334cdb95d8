"""The step loop's own time where many sequences decode: schedulers, passes of all ranks, tokens and events; no model, no text.

    python -m benchmarks.loop_time --ranks 8 --sequences 4 32 256

Prints a JSON object a line: medians over steps of this process, which computes nothing beside.
"""

import argparse
import json
import statistics
import time

from latentrt.planning import traces
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.costs import PAGE
from latentrt.planning.simulator import SimulatedBackend, serve
from latentrt.plugins.step_graph import Limits
from latentrt.runtime.engine.loop import EngineLoop

TOKENS, WARM_UP = 200, 20  # of each answer; steps that are not counted


class Free:
    """Kernels that take no time."""

    def seconds(self, ranks) -> dict[str, float]:
        return {"dense": 0.0}


class TimedLoop(EngineLoop):
    """Notes how long every step took."""

    def __init__(self, *options):
        super().__init__(*options)
        self.seconds: list[float] = []

    def step(self) -> bool:
        start = time.perf_counter()
        found = super().step()
        self.seconds.append(time.perf_counter() - start)
        return found


def measure(ranks: int, sequences: int) -> dict:
    """A step in which each of `ranks` ranks has `sequences` sequences that decode."""
    pages = [1 + sequences * -(-(TOKENS + 2) // PAGE)] * ranks
    backend = SimulatedBackend(Free(), Limits(TOKENS + 2, sequences, sequences), pages, Assumptions())
    loop = TimedLoop(backend)
    serve(backend, traces.draw(ranks * sequences, 1, TOKENS, spread=0), loop=loop)
    seconds, both = statistics.median(loop.seconds[WARM_UP:]), ranks * sequences
    return {"ranks": ranks, "sequences": both, "ms": 1e3 * seconds, "us_a_sequence": 1e6 * seconds / both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 32, 256], help="on each rank")
    arguments = parser.parse_args()
    for sequences in arguments.sequences:
        print(json.dumps(measure(arguments.ranks, sequences)))


if __name__ == "__main__":
    main()
