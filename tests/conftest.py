import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small, and several processes share the cores


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
