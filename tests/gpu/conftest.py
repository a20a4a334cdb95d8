"""Tests that need a CUDA GPU. Elsewhere they are skipped, with the reason."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible to PyTorch")
    from latentrt.plugins.launch import interpreter

    if interpreter.interpreting():
        pytest.skip("Triton runs its interpreter in this process; run pytest tests/gpu by itself")
    return torch.cuda.get_device_name()
