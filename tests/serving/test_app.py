"""What is deployed for a serving spec, and the spec file that we ship."""

import asyncio
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from tests.serving.models import Published
from tidepool.errors import ModelError, RegistryError, SpecError
from tidepool.models.source import ModelSource
from tidepool.registry import Registry
from tidepool.serving.app import Gateway, build
from tidepool.serving.directory import View
from tidepool.serving.engines import engines
from tidepool.serving.keys import KeyLog
from tidepool.serving.plan import NamedBases, plan_serving
from tidepool.specs import GatewaySpec, ServingSpec, parse_spec
from tidepool.storage import open_store

ROOT = Path(__file__).resolve().parents[2]


def plan(published: Published, *models: str) -> Any:
    return plan_serving(ServingSpec(store=published.store_url, models=list(models)), open_store(published.store_url))


def test_models_on_one_base_share_a_deployment(published: Published) -> None:
    found = plan(published, "bot", "tides", "bot@1", "tides@1")
    assert [base.ref for base in found.bases] == ["tides@1"]
    assert {entry: version.ref for entry, version in found.models.items()} == {
        "bot": "bot@2",
        "tides": "tides@1",
        "bot@1": "bot@1",
        "tides@1": "tides@1",
    }


def test_an_adapter_brings_its_base_along(published: Published) -> None:
    found = plan(published, "bot")
    assert [(base.ref, base.digest) for base in found.bases] == [("tides@1", published.base.digest)]


def test_models_that_cannot_be_deployed_say_why(published: Published, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="did you mean tides"):
        plan(published, "tide")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    registry = Registry(open_store(published.store_url))
    registry.publish("baseless", "adapter", folder, lineage={}, metrics={})
    with pytest.raises(ModelError, match="baseless@1 does not say which base"):
        plan(published, "baseless")
    registry.publish("moved", "adapter", folder, base="tides@1", base_digest="0f" * 32, lineage={}, metrics={})
    with pytest.raises(ModelError, match=r"moved@1 was trained on tides@1 with the files 0f0f"):
        plan(published, "moved")


def test_the_application_is_built_from_the_arguments_of_serve(published: Published) -> None:
    path, _, name = "serve.app:build".partition(":")
    assert getattr(importlib.import_module(path), name) is build
    application = build({"store": published.store_url, "models": ["bot"], "replicas": {"num_replicas": 2}})
    assert isinstance(application, serve.Application)
    with pytest.raises(SpecError, match="did you mean `models`"):
        build({"store": published.store_url, "model": ["bot"]})


def test_a_model_between_bounds_is_scaled_by_our_policy(published: Published) -> None:
    scale = {"min": 0, "max": 3, "ttft_s": 2.0, "up_after_s": 0.5, "down_after_s": 7, "zero_after_s": 8}
    config = deployment_of(published, replicas={"scale": scale})._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 3, None)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, None), "the policy's business"
    assert config.policy.policy_kwargs["limits"] == scale


def deployment_of(published: Published, **spec: Any) -> Any:
    """Of a base, as Serve is given it."""
    [base] = plan(published, "bot").bases
    value = {"store": published.store_url, "models": ["bot"]} | spec
    return engines("tidepool", parse_spec(value, ServingSpec), base)._bound_deployment


def test_a_base_is_deployed_anew_where_its_engine_differs_and_not_where_their_number_does(published: Published) -> None:
    first = deployment_of(published)
    assert first.name == f"Engine-{published.base.digest[:12]}"
    assert deployment_of(published).version == first.version
    assert deployment_of(published, replicas={"num_replicas": 5}).version == first.version
    assert deployment_of(published, engine={"weights": "int8"}).version != first.version


def test_the_bases_that_names_mean_are_followed_and_what_they_meant_before_counts_while_nobody_can_say(
    published: Published, tmp_path: Path
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    registry = Registry(store)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(number))
        registry.publish("whole", "full", folder, lineage={"number": number}, metrics={}, alias="production" if number == 1 else None)
    first, second = registry.versions("whole")
    spec = ServingSpec(store=store.url, models=["whole", "whole@1"])
    named = NamedBases(plan_serving(spec, store), store)
    assert named.look_up() == {first.digest: ModelSource("whole@1", first.digest, first)}
    registry.promote("whole", 2, canary_weight=0.1)
    assert named.look_up().keys() == {first.digest, second.digest}, "a canary needs its base too"
    registry.promote("whole", 2)
    assert named.look_up().keys() == {first.digest, second.digest}, "the other one is listed by its number"
    store.delete("models/whole/versions/2.json")
    assert named.look_up().keys() == {first.digest, second.digest}
    assert published.base.digest not in named.look_up()


def test_the_shipped_file_is_what_ray_and_we_accept() -> None:
    value = yaml.safe_load((ROOT / "serve/serve.yaml").read_text())
    config = ServeDeploySchema.model_validate(value)
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8000)
    [application] = config.applications
    assert (application.name, application.route_prefix, application.import_path) == ("tidepool", "/", "serve.app:build")
    spec = parse_spec(application.args | {"store": "memory://x"}, ServingSpec)
    assert spec == ServingSpec(store="memory://x", models=["tidepool-source-base", "tidepool-source-lora"])  # it shows the defaults


class Quiet:
    """The handle of a directory that has nothing to tell."""

    def __init__(self) -> None:
        self._views = [View("epoch", 0, (), ())]

    @property
    def watch(self) -> Any:
        return SimpleNamespace(remote=self._watch)

    async def _watch(self, *_: Any) -> View:
        if not self._views:
            await asyncio.Event().wait()
        return self._views.pop()


async def constructed(published: Published, host: str, monkeypatch: pytest.MonkeyPatch, **gateway: Any) -> Any:
    """The gateway's ASGI application as a replica of Serve constructs it, on a Serve that listens on a host."""
    client = SimpleNamespace(http_config=HTTPOptions(host=host))
    monkeypatch.setattr("tidepool.serving.app._get_global_client", lambda: client)
    spec = ServingSpec(store=published.store_url, models=["bot"], gateway=GatewaySpec(**gateway))
    found = plan_serving(spec, open_store(published.store_url))
    gateway = Gateway(spec, found.models, Quiet())  # type: ignore[arg-type]
    return await gateway.__serve_build_asgi_app__()


def test_a_gateway_that_others_reach_is_not_constructed_without_keys(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:

    async def statuses() -> list[int]:
        await constructed(published, "127.0.0.1", monkeypatch)
        with pytest.raises(SpecError, match=r"would listen on 0\.0\.0\.0 and ask nobody for a key"):
            await constructed(published, "0.0.0.0", monkeypatch)
        app = await constructed(published, "0.0.0.0", monkeypatch, require_keys=True)
        _, secret = KeyLog(open_store(published.store_url)).create("one")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tidepool") as client:
            headers: list[dict[str, str]] = [{}, {"Authorization": f"Bearer {secret}"}]
            return [(await client.get("/admin/keys", headers=one)).status_code for one in headers]

    assert asyncio.run(statuses()) == [401, 403], "the keys are those of the store"
