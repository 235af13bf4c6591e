"""Which values of sampling parameters make sense."""

import math
import pickle
from typing import Any

import pytest

from tidepool.errors import RequestError
from tidepool.inference.sampling_parameters import SamplingParameters

EDGES: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"temperature": 0.0},
    {"temperature": 100.0},
    {"top_p": 1e-9},
    {"top_k": 10**9},
    {"min_p": 1.0},
    {"repetition_penalty": 1e-3},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"logit_bias": ((0, -100.0), (99, 100.0))},
    {"stop_token_ids": frozenset({0, 99})},
    {"n": 128},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"seed": -(2**80)},
    {"json_schema": "{}"},
    {"regex": ""},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"top_k": -1}, "top_k is -1"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.1}, "min_p is 1.1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
    ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
    ({"logit_bias": ((100, 1.0),)}, "logit_bias has the token 100, and the model's tokens are 0 to 99"),
    ({"logit_bias": ((-1, 1.0),)}, "logit_bias has the token -1"),
    ({"logit_bias": ((5, 1.0), (6, 1.0), (5, 2.0))}, "logit_bias has the token 5 twice"),
    ({"logit_bias": ((5, 101.0),)}, "logit_bias has the value 101.0"),
    ({"logit_bias": ((5, math.nan),)}, "logit_bias has the value nan"),
    ({"stop_token_ids": frozenset({3, 100})}, "stop_token_ids has the token 100"),
    ({"n": 0}, "n is 0"),
    ({"n": 129}, "n is 129"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
    ({"stop": ("a", "")}, "stop string is empty"),
    ({"json_schema": "{}", "regex": "a"}, "one of them"),
    ({"grammar": "start: /a/", "regex": "a"}, "one of them"),
]


@pytest.mark.parametrize("values", EDGES)
def test_values_at_the_edge_pass_and_travel(values: dict[str, Any]) -> None:
    parameters = SamplingParameters(**{"max_tokens": 5, **values})
    parameters.check(100)
    assert pickle.loads(pickle.dumps(parameters)) == parameters
    assert hash(parameters) == hash(SamplingParameters(**{"max_tokens": 5, **values}))


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_value_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParameters(**{"max_tokens": 5, **values}).check(100)
