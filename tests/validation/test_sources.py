"""Any two sources on the same tokens: each against numbers from elsewhere, and what cannot be compared refused by name."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

import latentrt
from latentrt import cli
from latentrt.validation.errors import ValidationError
from latentrt.validation.sources import difference, open_source
from latentrt.validation.sources.base import Rows, Source
from latentrt.validation.sources.server import LOGPROBS
from tests import checkpoints
from tests.conftest import EXAMPLE, VOCAB_SIZE
from tests.runtime.server.serving import serving

pytestmark = pytest.mark.slow

WINDOWS = [list(range(3, 40)), [5, 6, 7, 8] * 9]


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.json"
    file.write_text(json.dumps(WINDOWS))
    return file


@pytest.fixture(scope="module")
def truth(tiny_checkpoint) -> list[np.ndarray]:
    """transformers' log probabilities of WINDOWS, float64."""
    model = checkpoints.reference(tiny_checkpoint)
    return [checkpoints.reference_logits(model, w).double().log_softmax(-1).numpy() for w in WINDOWS]


def run(capsys, *arguments) -> tuple[int, dict]:
    status = cli.main(["compare", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def holds(rows: Iterator[Rows], truth: list[np.ndarray], least: int) -> None:
    """Ids, order and values of a source are those of the truth; `least` tokens of each row at least."""
    for window, found, expected in zip(WINDOWS, rows, truth, strict=True):
        np.testing.assert_allclose(found.following, expected[np.arange(len(window) - 1), window[1:]], atol=1e-4)
        if found.ids is None:
            np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
            continue
        known = found.ids >= 0
        assert (known.sum(-1) >= least).all()
        for row, ids, values in zip(expected, found.ids, found.logprobs, strict=True):
            values = values[ids >= 0]
            np.testing.assert_allclose(row[ids[ids >= 0]], values, atol=1e-4)
            np.testing.assert_allclose(values[:least], np.sort(row)[::-1][:least], atol=1e-4)


def test_a_checkpoint_and_a_bundle(tiny_bundle, tiny_checkpoint, truth):
    windows = [np.array(w) for w in WINDOWS]
    for location in (tiny_checkpoint, tiny_bundle, f"{tiny_bundle}:cpu"):
        with open_source(str(location)) as source:
            holds(source.rows(windows), truth, VOCAB_SIZE)


def test_a_recorded_run(tiny_bundle, tiny_checkpoint, ids, tmp_path, capsys):
    """It holds what the engine made; compared with its own engine nothing is off; with the checkpoint, rounding."""
    file, text = tmp_path / "run.safetensors", tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n" * 40)
    assert cli.main(["record", str(tiny_bundle), "-o", str(file), "--text", str(text), "--tokens", "100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == file.stat().st_size < 200_000 and facts["executed"]["is_engine"]
    bundle = latentrt.load(tiny_bundle)
    window = bundle.tokenizer.encode(text.read_text(), special=False)[:100]
    with open_source(str(file)) as source:
        (rows,) = source.rows(source.given.windows)
        assert source.given.windows[0].tolist() == window
        expected = latentrt.validation.judge.metrics.log_softmax(bundle.logits([window]))
        np.testing.assert_allclose(rows.logprobs, np.sort(expected)[:, ::-1][:, : rows.ids.shape[1]], atol=1e-5)
        with pytest.raises(ValidationError, match="was recorded on other tokens"):
            source.rows([np.array(WINDOWS[0])])
    for other in (tiny_bundle, tiny_checkpoint):
        status, found = run(capsys, other, file)
        assert status == 0 and found["kl_mean"] < 1e-8 and found["top1_agreement"] == 1, found
        assert found["first_parting"] is None and not found["kl_is_whole"] and found["text"]["tokens"] == 100
        assert abs(found["perplexity_difference"]) < 1e-3 * found["perplexity_first"]
    assert found["second"]["checkpoint_sha256"] == found["first"]["checkpoint_sha256"]
    assert run(capsys, tiny_bundle, file, "--ids", ids)[0] == 2


def test_a_server(tiny_bundle, ids, truth, capsys):
    """Our own, over a socket: the likeliest tokens by id, with their numbers."""
    with serving(latentrt.load(tiny_bundle)) as live:
        with open_source(live.url) as source:
            holds(source.rows([np.array(w) for w in WINDOWS]), truth, LOGPROBS)
        status, found = run(capsys, tiny_bundle, f"{live.url}/v1", "--ids", ids)
        assert status == 0 and found["kl_mean"] < 1e-8 and found["text"]["tokens"] == sum(map(len, WINDOWS))
        assert found["second"]["executed"] == "model model of latentrt"
        assert run(capsys, live.url, live.url)[1]["error"].endswith("has a tokenizer; give token ids with --ids")
    assert "cannot be reached" in run(capsys, live.url, tiny_bundle)[1]["error"]


@contextmanager
def standing_in(answer, owner: str) -> Iterator[str]:
    """A server that answers completions with `answer` of the body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say(200, {"data": [{"id": "m", "owned_by": owner, "max_model_len": 64}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(*answer(body))

        def _say(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_of_tensorrt_llm(truth):
    """It forbids fields that it does not know and gives the prompt's logits (tensorrt_llm/serve/openai_protocol.py)."""
    known = {"model", "prompt", "max_tokens", "temperature", "return_context_logits"}

    def answer(body):
        assert set(body) <= known and body["return_context_logits"]
        return 200, {"choices": [{"text": "", "context_logits": (truth[WINDOWS.index(body["prompt"])] + 3).tolist()}]}

    with standing_in(answer, "tensorrt_llm") as url, open_source(url) as source:
        holds(source.rows([np.array(w) for w in WINDOWS]), truth, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, {"error": "no echo"}), "refused with status 400: {\"error\": \"no echo\"}"),
        ((200, {"choices": [{"logprobs": None}]}), "log probabilities of 0 tokens for a prompt of 37 and one more; echo with"),
        ((200, {"choices": [{"logprobs": {"token_logprobs": [-1] * 38, "top_logprobs": [{"the": -1}] * 38}}]}),
         "names tokens by their texts ('the')"),
    ],
)  # fmt: skip
def test_a_server_that_leaves_something_out(answer, words):
    with standing_in(lambda body: answer, "other") as url, open_source(url) as source:
        assert source.longest == 63
        with pytest.raises(ValidationError, match=f"^{url}.*") as error:
            list(source.rows([np.array(WINDOWS[0])]))
    assert words in str(error.value)


def test_llama_cpp(tmp_path, monkeypatch, truth):
    """Its package's interface (0.3.36): Llama(model_path, ...).eval(ids), then .scores [n_ctx, vocab]."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValidationError, match=r"llama_cpp is not installed \(pip install llama-cpp-python\)"):
        open_source(str(file))

    class Llama:
        def __init__(self, model_path, logits_all, **options):
            assert model_path == str(file) and logits_all
            self.scores = np.zeros((options["n_ctx"], VOCAB_SIZE), np.float32)

        def n_vocab(self):
            return VOCAB_SIZE

        def reset(self):
            self.scores[:] = np.nan

        def eval(self, tokens):
            self.scores[: len(tokens)] = truth[WINDOWS.index(tokens)] - 2

        def close(self):
            self.scores = None

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __version__="0.3.36"))
    with open_source(str(file)) as source:
        holds(source.rows([np.array(w) for w in WINDOWS]), truth, VOCAB_SIZE)


class Given(Source):
    """Rows that a test wrote."""

    kind = "given"

    def __init__(self, rows: list[Rows], vocab_size: int | None = None):
        super().__init__("given")
        self.known, self.vocab_size = rows, vocab_size

    def rows(self, windows):
        return iter(self.known)

    def describe(self):
        return {}


def test_the_difference_by_hand():
    """Two windows of a vocabulary of 3: every number again, without the code under test."""
    windows = [np.array([0, 1, 2]), np.array([2, 1])]
    p = [np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]), np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])]
    q = [np.array([[0.4, 0.4, 0.2], [0.1, 0.3, 0.6], [0.4, 0.4, 0.2]]), np.array([[0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])]
    first, second = (Given([Rows.of_logits(w, np.log(t) + 5) for w, t in zip(windows, s, strict=True)], 3) for s in (p, q))
    found = difference.compare(first, second, windows)
    kl = [(a * np.log(a / b)).sum(-1) for a, b in zip(p, q, strict=True)]
    assert found.kl_mean == pytest.approx(np.concatenate(kl).mean()) and found.kl_is_whole and found.covered == 1
    assert found.kl_max == pytest.approx(kl[1][0]) and found.kl_max_at == (1, 0)
    assert found.top1_agreement == pytest.approx(4 / 5)
    assert (found.first_parting.window, found.first_parting.position) == (1, 0)
    assert (found.first_parting.first, found.first_parting.second) == (1, 2)
    assert found.first_parting.margin == pytest.approx(np.log(0.5 / 0.3))
    assert found.perplexity_first == pytest.approx((0.3 * 0.7 * 0.5) ** (-1 / 3))
    assert found.perplexity_second == pytest.approx((0.4 * 0.6 * 0.3) ** (-1 / 3))
    with pytest.raises(ValidationError, match="3 tokens in its vocabulary, given has 4"):
        difference.compare(first, Given([], 4), windows)


def test_kl_of_the_likeliest_is_at_most_the_whole_one():
    """And equal to that of the same distributions with all other tokens taken together."""
    rng = np.random.default_rng(0)
    a, b = (Rows.of_logits(np.arange(20), rng.normal(0, 2, (20, 50))) for _ in range(2))
    whole = difference.divergence(a, b)
    for first, second in ((a.likeliest(8), b), (a, b.likeliest(8)), (a.likeliest(8), b.likeliest(12))):
        part = difference.divergence(first, second)
        assert not part.whole and (part.kl <= whole.kl + 1e-12).all()
        for row in range(20):
            ids = [set(range(50)) if s.ids is None else set(s.ids[row].tolist()) for s in (first, second)]
            shared = sorted(ids[0] & ids[1])
            p, q = np.exp(a.logprobs[row]), np.exp(b.logprobs[row])
            p, q = ([*t[shared], 1 - t[shared].sum()] for t in (p, q))
            assert part.kl[row] == pytest.approx((np.array(p) * np.log(np.array(p) / q)).sum(), abs=1e-9)
            assert part.covered[row] == pytest.approx(1 - p[-1])
    same = difference.divergence(a.likeliest(8), replace(a).likeliest(8))
    assert same.kl.max() < 1e-9


@pytest.mark.parametrize(
    ("location", "words"),
    [("none.gguf", "none.gguf: no such file or folder; accepted: a server's URL"), ("/", "/: is nothing to compare")],
)
def test_what_is_no_source(location, words):
    with pytest.raises(ValidationError, match=f"^{words}"):
        open_source(location)


def test_files_that_are_no_recordings(tmp_path):
    broken, other = tmp_path / "broken.safetensors", EXAMPLE / "model.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValidationError, match="cannot be read as a recorded run"):
        open_source(str(broken))
    with pytest.raises(ValidationError, match="is no recorded run; make one with latentrt record"):
        open_source(str(other))


@pytest.mark.parametrize(("out", "words"), [("a.bin", "is a .safetensors file"), ("no/a.safetensors", "its folder is missing")])
def test_a_recording_that_cannot_be_written(tiny_bundle, tmp_path, capsys, out, words):
    assert cli.main(["record", str(tiny_bundle), "-o", str(tmp_path / out), "--json"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]
