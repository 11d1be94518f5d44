import threading
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


def test_time_inside_other_work_can_be_taken_off():
    watch = Stopwatch()
    with watch.span("choose"):
        with watch.span("wait"):
            time.sleep(0.05)
        with watch.span("load"):
            time.sleep(0.02)
    with watch.span("wait"):
        time.sleep(0.05)
    assert watch.seconds("choose") >= 0.07
    assert 0.02 <= watch.seconds("choose", without="wait") <= watch.seconds("choose") - 0.05
    assert watch.seconds("choose") <= watch.elapsed


def test_blocks_of_another_thread_do_not_nest():
    watch = Stopwatch()

    def other():
        with watch.span("wait"):
            time.sleep(0.02)

    with watch.span("recompute"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert watch.seconds("wait") >= 0.02
    assert watch.seconds("recompute", without="wait") == watch.seconds("recompute")
