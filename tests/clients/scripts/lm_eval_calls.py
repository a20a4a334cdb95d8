"""The lm-eval package."""

import lm_eval
from lm_eval.tasks import TaskManager

KEPT = "doc", "filtered_resps"


def evaluate(model_args: dict, folder: str, tasks: list[str]) -> dict[str, list[dict]]:
    """The samples of tasks, whose files are in a folder, with local-completions."""
    manager = TaskManager(include_path=folder, include_defaults=False)  # its own 10,000 tasks take seconds to list
    found = lm_eval.simple_evaluate(
        "local-completions", model_args, tasks, task_manager=manager, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    return {task: [{name: sample[name] for name in KEPT} for sample in found["samples"][task]] for task in tasks}
