"""Architectures of timm: BatchNorms that are functions, checks of shapes, modules that torch.fx cannot trace."""

from __future__ import annotations

import pytest

pytest.importorskip("timm", reason="timm is not installed: pip install 'ptq4cuda[networks]'")

import timm_networks

# BatchNorms that stay, where there are: behind convolutions that pad to the size of the image.
NETWORKS = {"test_resnet": 0, "test_efficientnet": 0, "test_byobnet": 0, "test_convnext": 0, "starnet_s050": 0}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_quantized_saved_and_loaded(name: str) -> None:
    outcome = timm_networks.try_network(name, 64)
    assert outcome.equal
    assert outcome.walked_by == "graph", outcome.reason
    assert outcome.folded == outcome.norms - NETWORKS[name]
