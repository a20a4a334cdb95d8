"""A server that the tests of this folder share, the engine that tells the truth about its answers, and clients."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import latentrt
from tests.clients.serving import Served
from tests.clients.workers import Worker, node_worker, python_worker


@pytest.fixture(scope="session")
def engine(example_bundle):
    """The same bundle as the server's, in this process."""
    with latentrt.load(example_bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def start(example_bundle, tmp_path_factory):
    """Starts a server with options for a `with` block, after which it must have ended well."""

    @contextmanager
    def started(*options: str, key: str = "none", bundle: Path = example_bundle) -> Iterator[Served]:
        served = Served(bundle, tmp_path_factory.mktemp("served") / "log", *options, key=key)
        try:
            yield served
        finally:
            status = served.stop()
        assert status == 0, served.log.read_text()[-2000:]
        assert "Traceback" not in served.log.read_text(), served.log.read_text()[-4000:]

    return started


@pytest.fixture(scope="session")
def served(start) -> Iterator[Served]:
    with start() as served:
        yield served


def client(calls: str, make: Callable[..., Worker] = python_worker):
    """A fixture: the process of one client, which starts when the first test wants it."""

    @pytest.fixture(scope="session")
    def worker(tmp_path_factory) -> Iterator[Worker]:
        with closing(make(calls, tmp_path_factory.mktemp("client"))) as worker:
            yield worker

    return worker


openai_python, openai_npm = client("openai_calls"), client("openai_calls", node_worker)
litellm, langchain, lm_eval = (client(f"{name}_calls") for name in ("litellm", "langchain", "lm_eval"))


@pytest.fixture(params=["python", "npm"])
def openai(request) -> Worker:
    """OpenAI's own client, in both languages."""
    return request.getfixturevalue(f"openai_{request.param}")
