"""A server that the tests of this folder share, the engine that tells the truth about its answers, and clients."""

from collections.abc import Iterator
from contextlib import contextmanager

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
    def started(*options: str, key: str = "none") -> Iterator[Served]:
        served = Served(example_bundle, tmp_path_factory.mktemp("served") / "log", *options, key=key)
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


@contextmanager
def closed(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="session")
def openai_python(tmp_path_factory) -> Iterator[Worker]:
    with closed(python_worker("openai_calls", tmp_path_factory.mktemp("python"))) as worker:
        yield worker


@pytest.fixture(scope="session")
def openai_npm(tmp_path_factory) -> Iterator[Worker]:
    with closed(node_worker("openai_calls", tmp_path_factory.mktemp("npm"))) as worker:
        yield worker


@pytest.fixture(params=["python", "npm"])
def openai(request) -> Worker:
    """OpenAI's own client, in both languages."""
    return request.getfixturevalue(f"openai_{request.param}")
