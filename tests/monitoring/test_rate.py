import sys
import threading
import time

import pytest

from madgen.monitoring.rate import Rate


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rate(clock):
    return Rate(300.0, clock)


def make(rate, clock, seconds, count=1):
    clock.now += seconds
    rate.add(count)


def test_rate_is_unknown_before_the_first_sample(rate, clock):
    clock.now += 10
    assert (rate.per_second(), rate.error()) == (None, None)


def test_first_batch_is_ignored(rate, clock):
    for seconds in (60, 2, 2, 2, 2):
        make(rate, clock, seconds, count=4)
    assert rate.per_second() == pytest.approx(2.0)
    assert rate.error() == pytest.approx(0.0, abs=1e-9)
    assert rate.total == 20


def test_time_before_the_start_is_ignored(rate, clock):
    clock.now += 1000
    rate.begin()
    make(rate, clock, 2)
    assert rate.per_second() == pytest.approx(0.5)


def test_only_an_overdue_batch_lowers_the_rate(rate, clock):
    for _ in range(6):
        make(rate, clock, 10)
    assert rate.per_second() == pytest.approx(0.1)
    clock.now += 10
    assert rate.per_second() == pytest.approx(0.1)
    clock.now += 90
    assert rate.per_second() < 0.05


def test_rate_covers_the_window(rate, clock):
    for _ in range(100):
        make(rate, clock, 10)
    for _ in range(400):
        make(rate, clock, 1)
    assert rate.per_second() == pytest.approx(1.0)


def test_uneven_batches_have_a_larger_error(clock):
    even, uneven = Rate(300.0, clock), Rate(300.0, clock)
    for step in range(40):
        clock.now += 1 + step % 3
        uneven.add(1)
        even.add(1 + step % 3)
    assert even.error() == pytest.approx(0.0, abs=1e-9)
    assert 0.1 < uneven.error() < 1


def test_rate_can_be_read_while_another_thread_counts():
    rate, ended, seen = Rate(0.05), threading.Event(), []

    def count():
        while not ended.is_set():
            rate.add(1)

    thread = threading.Thread(target=count)
    before, until = sys.getswitchinterval(), time.monotonic() + 1
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        while time.monotonic() < until:
            seen += [rate.per_second(), rate.error()]
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)
    assert max(value for value in seen if value is not None) > 0
