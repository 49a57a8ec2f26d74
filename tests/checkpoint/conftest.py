"""One rank alone, and what it agrees on with itself."""

import pytest
import torch.distributed as dist

from fastpref.checkpoint.agreement import Agreement
from fastpref.distributed import init_world


@pytest.fixture(scope="module")
def world():
    world = init_world()
    yield world
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def agreement(world):
    with Agreement(world) as agreement:
        yield agreement
