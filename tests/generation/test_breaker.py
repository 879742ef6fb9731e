import pytest

from madgen.generation.circuit_breaker import CircuitBreaker


def run(breaker, outcomes):
    for failed in outcomes:
        breaker.record(failed)
    return breaker.tripped


def test_trips_above_the_share_of_the_window_and_stays_tripped():
    breaker = CircuitBreaker(0.2, 50)
    assert run(breaker, [False] * 40 + [True] * 10) is None  # exactly 0.2
    assert run(breaker, [True]) == "11 of the last 50 samples failed, more than quarantine.max_share=0.2 allows"
    assert run(breaker, [False] * 100) == "11 of the last 50 samples failed, more than quarantine.max_share=0.2 allows"


def test_failures_before_the_window_do_not_count():
    assert run(CircuitBreaker(0.5, 10), ([True] * 5 + [False] * 5) * 20) is None
    assert run(CircuitBreaker(0.5, 10), [False] * 1000 + [True] * 5) is None
    assert run(CircuitBreaker(0.5, 10), [False] * 1000 + [True] * 6) is not None


@pytest.mark.parametrize(("window", "least"), [(50, 10), (10, 10), (4, 4), (1, 1)])
def test_does_not_trip_on_the_first_samples_alone(window, least):
    breaker = CircuitBreaker(0.2, window)
    assert run(breaker, [True] * (least - 1)) is None
    assert (
        run(breaker, [True]) == f"{least} of the last {least} samples failed, more than quarantine.max_share=0.2 allows"
    )


def test_share_0_allows_no_failure_and_1_allows_all():
    assert run(CircuitBreaker(0.0, 50), [False] * 9) is None
    assert run(CircuitBreaker(0.0, 50), [False] * 9 + [True]) is not None
    assert run(CircuitBreaker(1.0, 50), [True] * 1000) is None


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_exactly_the_share_is_allowed_despite_rounding(share):
    failures = round(share * 100)
    assert run(CircuitBreaker(share, 100), [False] * (100 - failures) + [True] * failures) is None
    assert run(CircuitBreaker(share, 100), [False] * (99 - failures) + [True] * (failures + 1)) is not None
