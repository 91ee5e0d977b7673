"""What every test file needs: the repository on the path, no network, the same random numbers every time."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with SIGINT ignored
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def teacher():
    """The tiny teacher that ships."""
    import model

    return model.load(Path(model.__file__).parent / "tiny/teacher")


@pytest.fixture(scope="module")
def blind(teacher):
    """A student to which every picture looks the same."""
    import model
    from support.world import TINY

    torch.manual_seed(0)
    vlm = model.VLM.assemble(
        teacher.vision, model.load_lm(TINY / "student"), teacher.tokenizer, teacher, taf=True
    )
    with torch.no_grad():
        for parameter in vlm.adapter.student.parameters():
            parameter.zero_()
    return vlm.eval()
