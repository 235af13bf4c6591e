"""On Ray Serve: a published adapter is picked up while requests go on, and what happens to a request at a replica gets home."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from openai import OpenAI
from ray import serve

from tests.serving.fakes import BASE_DIGEST, full
from tests.serving.models import Published, publish, publish_adapter
from tests.serving.obedient import NAMESPACE, SIGNALS, ObedientReplica, Signals
from tests.training.nodes import free_port
from tidepool import local_cluster
from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference.engine import Output
from tidepool.local_cluster import LocalCluster
from tidepool.serving.app import Gateway, directory_deployment, follow
from tidepool.serving.backend import Call, Frame, Started
from tidepool.serving.directory import View
from tidepool.serving.engines import SHUTDOWN_TIMEOUT_S
from tidepool.serving.fleet import Fleet
from tidepool.specs import GatewaySpec, ServingSpec

pytestmark = pytest.mark.cluster
_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A base and an adapter in the cluster's store, served."""
    published = publish(cluster.store_url, tmp_path_factory.mktemp("models"), base="serving-tides", adapter="serving-bot")
    local_cluster.serve(cluster, ["serving-tides", "serving-bot"])
    return published


@pytest.fixture
def client(cluster: LocalCluster, served: Published) -> Iterator[OpenAI]:
    del served
    with OpenAI(base_url=cluster.api_url, api_key="any", max_retries=0, timeout=_TIMEOUT_S) as one:
        yield one


def complete(client: OpenAI, model: str) -> tuple[str, str]:
    """What a model says, and the version that said it."""
    answer = client.completions.create(model=model, prompt="the tide", max_tokens=8, temperature=0)
    return answer.choices[0].text, str(answer.system_fingerprint)


def test_a_new_version_of_an_adapter_answers_without_a_redeployment(client: OpenAI, served: Published, tmp_path: Path) -> None:
    base, before = complete(client, "serving-tides"), complete(client, "serving-bot")
    assert before[0] != base[0]
    assert before[1].startswith("serving-bot@1-")
    errors: list[Exception] = []
    changed, num_answers = threading.Event(), 0

    def go_on() -> None:
        nonlocal num_answers
        while not changed.is_set():
            try:
                complete(client, "serving-bot")
                num_answers += 1
            except openai.OpenAIError as error:
                errors.append(error)

    others = threading.Thread(target=go_on)
    others.start()
    try:
        publish_adapter(served, tmp_path / "next", "serving-bot", seed=7)
        deadline = time.monotonic() + _TIMEOUT_S
        while (after := complete(client, "serving-bot"))[1] == before[1]:
            assert time.monotonic() < deadline
    finally:
        changed.set()
        others.join()
    assert errors == []
    assert num_answers > 0
    assert after[1].startswith("serving-bot@2-")
    assert after[0] not in (before[0], base[0])
    assert complete(client, "serving-bot@1")[0] == before[0]
    assert complete(client, "serving-tides") == base


def test_chats_streams_and_refusals(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="serving-bot",
            messages=[{"role": "user", "content": "the tide"}],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    whole = client.chat.completions.create(
        model="serving-bot", messages=[{"role": "user", "content": "the tide"}], max_tokens=8, temperature=0
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [model.id for model in client.models.list()] == ["serving-tides", "serving-bot"]
    with pytest.raises(openai.NotFoundError, match="did you mean serving-bot"):
        complete(client, "serving-bott")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="serving-tides", prompt="the tide", max_tokens=1000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no token 999999"):
        client.completions.create(model="serving-tides", prompt=[999999], stream=True)


# --- A replica that does what it is told -----------------------------------------------------------------------------


def deploy_gateways(cluster: LocalCluster, num: int, **own: Any) -> None:
    """Our gateways on Serve, in an application `obedient`."""
    options = {"num_replicas": num, "ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": SHUTDOWN_TIMEOUT_S}
    gateway = serve.deployment(serve.ingress()(Gateway), **options)
    spec = ServingSpec(store=cluster.store_url, models=["obedient"], resolve_ttl_s=1000, gateway=GatewaySpec(**own))
    application = gateway.bind(spec, {"obedient": full("obedient")}, directory_deployment().bind())
    serve.run(application, name="obedient", route_prefix="/obedient")


@pytest.fixture(scope="module")
def obedient_url(cluster: LocalCluster, served: Published) -> Iterator[str]:
    """Our gateway on Serve before a replica that does what it is told."""
    del served  # Serve runs, on the ports of the cluster
    replica = serve.deployment(ObedientReplica, name="Obedient", ray_actor_options={"num_cpus": 0})
    deploy_gateways(cluster, 1)
    serve.run(replica.bind("obedient"), name="obedient-replica", route_prefix=None)
    yield cluster.api_url.replace("/v1", "/obedient/v1")
    for name in ("obedient-replica", "obedient"):
        serve.delete(name)


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    """A gateway's replicas, in this process: those that the application's directory lists."""
    one = Fleet()

    async def take(view: View) -> None:
        one.update(view.endpoints)

    following = asyncio.create_task(follow(serve.get_deployment_handle("Directory", "obedient"), take))
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            yield one
    finally:
        following.cancel()
        await one.close()


@pytest.fixture(scope="module")
def signals(cluster: LocalCluster) -> Iterator[Any]:
    del cluster
    actor = Signals.options(name=SIGNALS, namespace=NAMESPACE).remote()
    yield actor
    ray.kill(actor)


def call_of(prompt: str) -> Call:
    return Call("r", BASE_DIGEST, None, prompt)


async def frames_of(one: Fleet, prompt: str) -> list[Frame]:
    return [frame async for frame in one.generate(call_of(prompt))]


def test_a_replicas_errors_arrive_as_they_were_raised(obedient_url: str) -> None:
    del obedient_url

    async def run() -> None:
        async with fleet() as one:
            assert (await frames_of(one, "go"))[1:] == [Output((1,), "a"), Output((2,), "b", "stop")]
            with pytest.raises(EngineBusyError, match="full"):
                await frames_of(one, "busy")
            with pytest.raises(RequestError, match="wrong"):
                await frames_of(one, "wrong")

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_request_at_the_replica(obedient_url: str, signals: Any, stream: bool) -> None:
    body = {"model": "obedient", "prompt": f"wait {stream}", "stream": stream}
    if stream:
        with httpx.stream("POST", f"{obedient_url}/completions", json=body, timeout=_TIMEOUT_S) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{obedient_url}/completions", json=body, timeout=httpx.Timeout(_TIMEOUT_S, read=1))
    ray.get(signals.wait_for.remote(f"cancelled wait {stream}"), timeout=_TIMEOUT_S)


@pytest.mark.long
def test_gateways_that_are_replaced_finish_their_streams_while_others_answer(
    cluster: LocalCluster, obedient_url: str, signals: Any
) -> None:
    port = free_port()
    deploy_gateways(cluster, 2, port=port)
    urls = [f"http://127.0.0.1:{port}/v1", obedient_url]

    def ask() -> None:
        for url in urls:
            with httpx.Client(transport=httpx.HTTPTransport(retries=2), timeout=_TIMEOUT_S) as client:
                answered = client.post(f"{url}/completions", json={"model": "obedient", "prompt": "go"})
            assert answered.json()["choices"][0]["text"] == "ab"

    replacing = threading.Thread(target=deploy_gateways, args=(cluster, 2), kwargs={"port": port, "timeout_s": 599})
    body = {"model": "obedient", "prompt": "hold", "stream": True}
    with httpx.stream("POST", f"{urls[0]}/completions", json=body, timeout=_TIMEOUT_S) as response:
        lines = response.iter_lines()
        assert '"text":"a"' in next(lines)
        replacing.start()
        deadline = time.monotonic() + 15  # long enough for the other one to be replaced, and this one to be asked to go
        while time.monotonic() < deadline:
            ask()
        assert replacing.is_alive(), "they were replaced while one had a stream"
        ray.get(signals.tell.remote("go on"))
        rest = list(lines)
    assert '"text":"b"' in "".join(rest)
    assert rest[-2:] == ["data: [DONE]", ""]
    replacing.join(_TIMEOUT_S)
    assert not replacing.is_alive()
    ask()


def test_statuses_come_through_serve(obedient_url: str) -> None:
    for prompt, status in (("go", 200), ("busy", 429), ("wrong", 400)):
        response = httpx.post(f"{obedient_url}/completions", json={"model": "obedient", "prompt": prompt}, timeout=_TIMEOUT_S)
        assert response.status_code == status, response.text


@pytest.mark.long
def test_a_request_whose_only_replica_dies_is_finished_by_the_one_that_serve_starts(obedient_url: str) -> None:
    del obedient_url

    async def run() -> None:
        async with fleet() as one:
            frames = one.generate(call_of("wait"))
            started = await anext(frames)
            assert isinstance(started, Started)
            assert await anext(frames) == Output((1,), "a")
            os.kill(started.num_prompt_tokens, signal.SIGKILL)
            assert [frame async for frame in frames] == [Output((2,), "b", "stop")]

    asyncio.run(run())
