"""Runs functions of one module beside this file: `worker.py MODULE`, calls on stdin, answers on stdout."""

import importlib
import json
import os
import sys


def told(error: BaseException) -> dict:
    """An error as data; the fields are those of the openai package."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or {}
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error),
        "status": getattr(error, "status_code", None), "code": getattr(error, "code", None),
        "param": getattr(error, "param", None), "retry_after": headers.get("retry-after"),
    }  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no answer
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"value": getattr(module, call["name"])(*call["args"], **call["kwargs"])}
        except Exception as error:
            answer = {"error": told(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
