"""Program: builds a job and prints what TensorRT says of the engine's layers and memory. `... JOB.json`, one message a line."""

import importlib
import json
import sys
from pathlib import Path

from latentrt.export.lowering.tensorrt import build as tensorrt_build

TOLD = ("Engine Layer Information", "Total Activation Memory")


def logger(trt):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            if message.startswith(TOLD):
                print(json.dumps(message), flush=True)

    return Logger()


if __name__ == "__main__":
    tensorrt_build._logger = logger
    job = tensorrt_build.BuildJob(**json.loads(Path(sys.argv[1]).read_text()))
    tensorrt_build.build(importlib.import_module(job.module), job, lambda fraction: None)
