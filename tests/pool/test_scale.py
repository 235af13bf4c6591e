"""The work of a round, counted in function calls, so that no neighbour on the machine can change the figure."""

import math

from benchmarks.pool_scale import num_calls, states
from tidepool.pool import decide


def test_the_work_of_a_round_grows_no_faster_than_n_log_n() -> None:
    small, large = states(100), states(800)
    for name in small:
        growth = num_calls(large[name]) / num_calls(small[name])
        assert growth <= 800 * math.log(800) / (100 * math.log(100)), name


def test_the_measured_states_are_what_they_are_called() -> None:
    pools = states(100)
    assert not decide(pools["roomy, at rest"]).waits
    assert decide(pools["overloaded, at rest"]).waits
    assert decide(pools["roomy, serving grows"]).decisions
    assert decide(pools["overloaded, serving grows"]).decisions
