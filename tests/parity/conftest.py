"""Parity: ours beside independent implementations (requirements-peers.lock), with the same weights and inputs in one process."""

import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.parity)
            item.add_marker(pytest.mark.filterwarnings("default"))  # the peers' warnings are not ours


@pytest.fixture(scope="session")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        import torch

        # torchvision's compiled part does not load beside a CPU build of PyTorch: what it lacks is declared, never called
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.set_num_threads(2)
        yield torch


@pytest.fixture(scope="session")
def diffusers(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        import diffusers

        yield diffusers


@pytest.fixture(scope="session")
def torch_fidelity(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        import torch_fidelity

        yield torch_fidelity
