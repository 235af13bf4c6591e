"""Whatever the OpenAPI document lets people send, and what it does not: no answer is a 5xx, and each is as the document says.

Schemathesis makes the requests. So that more of them reach the engine, most are made to name a model that is there, and most leave out
all but a few of the fields that nobody has to give, in messages too, since random fields in each other's company are mostly refused.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import content_type_conformance, not_a_server_error, response_schema_conformance, status_code_conformance
from starlette.applications import Starlette

from tests.serving.local import LocalModel, gateway_of
from tidepool.specs import GatewaySpec

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize")
REQUIRED = ("model", "prompt", "messages", "input")
_TIMEOUT_S = 120  # for 128 answers on a busy machine
NUM_CASES = 2000
"""For each of the five: 10,000 in all."""
SLOW = ("response_format", "structured_outputs", "text")  # each schema is compiled in a process of its own first


@pytest.fixture(scope="module")
def app() -> Starlette:
    return gateway_of(LocalModel(max_batch_size=8), GatewaySpec(max_new_tokens=16))


def plain(message: Any) -> Any:
    """A message without what belongs to some roles alone, and with some content."""
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    return {"role": "user" if role == "tool" else role, "content": message.get("content") or "the tide"}


def fuzz(app: Starlette, method: str, path: str, num_cases: int, leave_out: tuple[str, ...] = ()) -> Counter[int]:
    """Send cases to one endpoint, a third of them against its schema; returns how many had each status."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operation = schema[path][method]
    statuses: Counter[int] = Counter()
    against = [operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)] if path in POSTS else []
    cases = st.one_of([operation.as_strategy(), operation.as_strategy(), *against])

    # Nothing is made shorter: each case is an HTTP request, which says enough, and a chat takes the model's time.
    @settings(max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=cases, is_known=st.integers(0, 9).map(bool), kept=st.sets(st.integers(0, 40), max_size=4), is_whole=st.integers(0, 9))
    def send(case: Any, is_known: bool, kept: set[int], is_whole: int) -> None:
        if isinstance(case.body, dict):
            fields = [name for name in case.body if name in REQUIRED or name not in leave_out]
            if is_whole:
                fields = [name for index, name in enumerate(fields) if name in REQUIRED or index in kept]
            case.body = {name: case.body[name] for name in fields}
            if is_whole and isinstance(messages := case.body.get("messages"), list):
                case.body["messages"] = [plain(message) for message in messages]
            if is_known and isinstance(case.body.get("model"), str):
                case.body["model"] = "tides"
                if "messages" in case.body and len(kept) < 2:  # nearly all that are made have no content, which is one refusal
                    case.body["messages"] = [{"role": "user", "content": "the tide"}]
        statuses[case.call_and_validate(checks=CHECKS, timeout=_TIMEOUT_S).status_code] += 1

    send()
    return statuses


@pytest.mark.parametrize("path", POSTS)
def test_no_request_makes_the_server_fail(app: Starlette, path: str) -> None:
    statuses = fuzz(app, "POST", path, 40, leave_out=SLOW)
    assert statuses[200] > 0, "some of them have to be served"
    assert statuses[400] > 0, "some of them have to be refused"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/admin/keys", "/health", "/ready", "/openapi.json"])
def test_nor_does_one_that_only_reads(app: Starlette, path: str) -> None:
    fuzz(app, "GET", path, 20)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", POSTS)
def test_ten_thousand_cases(app: Starlette, path: str, record_property: Callable[[str, object], None]) -> None:
    statuses = fuzz(app, "POST", path, NUM_CASES)
    record_property("statuses", dict(statuses))
    print(path, dict(statuses))
    assert statuses.total() >= NUM_CASES
    assert statuses[200] > 50
