import time

import pytest
import torch

from picache.linking.stopwatch import Stopwatch


def test_spans_of_one_name_add_up():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.span("sleep"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="inside"), watch.span("failing"):
        raise ValueError("inside")
    assert 0.04 <= watch.seconds("sleep") < 10
    assert watch.seconds("failing") >= 0
    assert watch.seconds("never entered") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_span_on_a_cuda_device_lasts_until_the_device_is_done():
    watch = Stopwatch(torch.device("cuda"))
    begun = time.perf_counter()
    with watch.span("sleep"):
        torch.cuda._sleep(200_000_000)
    returned = time.perf_counter() - begun
    assert watch.seconds("sleep") > returned, "nothing waited inside the span"
