"""What the simulator's arithmetic says of decode steps that a GPU's results hold.

    python -m benchmarks.predicted_steps FILE [NAME=NUMBER ...]

FILE is a JSON of benchmarks/results that gpu-check wrote, with section measure-model: V2-Lite, random weights, one GPU. Prints
milliseconds of each step, measured and predicted, with the assumptions of `latentrt simulate` or those given.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from latentrt.export.models.deepseek_v2.config import parse
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.costs import ExpertParallel, Measured, Speeds
from latentrt.planning.gpus import GPUS
from latentrt.planning.roofline import Deployment
from latentrt.planning.routing import Routing
from latentrt.planning.simulation import formats
from latentrt.planning.sizes import Model
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.ranks.lockstep import Pass

CONFIG = Path(__file__).parents[1] / "tests" / "configs" / "v2_lite.json"
STEP = re.compile(r"V2-Lite (\S+), batch (\d+), context (\d+)")


def predicted(gpu: str, precision: str, sequences: int, context: int, assumed: Assumptions) -> dict[str, float]:
    """Seconds of a captured decode step by part."""
    config = parse(json.loads(CONFIG.read_text()))
    model = Model.of(config)
    deployment = Deployment(model, GPUS[gpu], 1, formats(model)[precision], "bfloat16", max(sequences, 256))
    costs = ExpertParallel(deployment, Speeds(deployment.gpu, assumed), "gather", Routing(config, 1), Measured({}))
    batch = pack([SequenceRows([7], context, [0])] * sequences, np.ones((sequences, context // 64 + 1), int))
    return costs.seconds([Pass(StepShape.of(batch), True, batch, np.arange(sequences))])


def main(file: Path, settings: list[str]) -> None:
    found = json.loads(file.read_text())
    gpu, assumed = next(name for name in GPUS if name in found["gpu"]), Assumptions.of(settings)
    columns = "precision", "sequences", "measured, ms", "predicted, ms", "measured / predicted"
    table = Table(*columns, title=f"{found['gpu']}, {found['date']}")
    for row in found["measurements"]:
        if step := STEP.fullmatch(row["name"]):
            precision, sequences, context = step[1], int(step[2]), int(step[3])
            ms = 1e3 * sum(predicted(gpu, precision, sequences, context, assumed).values())
            table.add_row(precision, step[2], f"{row['step_ms']:.2f}", f"{ms:.2f}", f"{row['step_ms'] / ms:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
