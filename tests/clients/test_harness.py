"""lm-eval's model class over an engine, against lm-eval's own over transformers: the same requests, the same answers."""

import json
import os
import subprocess
import sysconfig

import pytest

from tests.clients.workers import PYTHON, ROOT, environment, needed
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from latentrt.validation.harness import LatentRt

bundle, checkpoint = sys.argv[1:]
pairs = [("import os\\nprint(os.", "path"), ("def main(", "self"), ("", "class A:"), ("x = 1 ", "+ 2"),
         ("for Ä in", " range(3):")]
texts = ["import os\\n", "def read(path):\\n    with open(path) as file:\\n        return file.read()\\n" * 3]
prompts = [("def main(", {"until": ["\\n"], "max_gen_toks": 8}), ("import os", {"until": ["zz"], "max_gen_toks": 12})]

def asked(kind, arguments):
    return [Instance(kind, {}, a, n) for n, a in enumerate(arguments)]

found = {}
def transformers(**options):
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=1, **options)

ours, theirs = LatentRt(bundle, threads=1), transformers(add_bos_token=True)
plain = transformers(add_bos_token=False)  # else it would score a second bos, given the first
for name, model, rolling in (("ours", ours, ours), ("theirs", theirs, plain)):
    found[name] = {
        "loglikelihood": model.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True),
        "rolling": rolling.loglikelihood_rolling(asked("loglikelihood_rolling", [(t,) for t in texts]), disable_tqdm=True),
        "answers": model.generate_until(asked("generate_until", prompts), disable_tqdm=True),
        "chat": model.apply_chat_template([{"role": "user", "content": "What is a list?"}]),
    }
print(json.dumps(found))
"""


def test_it_answers_as_transformers_does(example_bundle):
    packages = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])  # ours beside the clients'
    done = subprocess.run(
        [str(needed(PYTHON)), "-c", SCRIPT, str(example_bundle), str(EXAMPLE)],
        env=environment({"PYTHONPATH": packages}), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["ours"], found["theirs"]
    # float32 logits of both agree within 2e-5 (validate); sums over up to 60 tokens
    for (value, greedy), (expected, their_greedy) in zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True):
        assert value == pytest.approx(expected, abs=1e-3) and greedy == their_greedy
    assert ours["rolling"] == pytest.approx(theirs["rolling"], abs=5e-3)
    assert ours["answers"] == theirs["answers"] and ours["chat"] == theirs["chat"]
