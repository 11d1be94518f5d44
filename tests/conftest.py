import pytest
import torch
from hypothesis import settings

# A busy machine is no fault of the code: timings are never asserted in tests.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors run faster on one thread, and sums come out the same on any machine.

    In what tests start too: threads of several processes that wait for each other on the same
    cores take ten times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    """The code of the pages that takes long is run where it is asked for, by .ci/docs."""
    if "docs" not in config.getoption("markexpr"):
        left_out = pytest.mark.skip(reason="takes long: .ci/docs runs it, by -m docs")
        for item in items:
            if item.get_closest_marker("docs"):
                item.add_marker(left_out)
