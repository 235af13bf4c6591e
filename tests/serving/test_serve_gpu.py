"""A base and an adapter on a GPU, through Ray Serve: they answer what transformers and peft compute on a CPU."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from peft import PeftModel

from tests.serving.models import Published, publish
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers by an old name
]
PROMPT, NUM_TOKENS = "the tide", 24


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    running = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=8, log=tmp_path / "ray.log", find_gpus=True)
    try:
        yield running
    finally:
        local_cluster.stop(running)


def greedy(model: Any, published: Published) -> str:
    tokens = torch.tensor([published.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_TOKENS, do_sample=False)
    text: str = published.tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True)
    return text


def test_a_base_and_an_adapter_answer_on_a_gpu_as_on_a_cpu(cluster: LocalCluster, tmp_path: Path) -> None:
    published = publish(cluster.store_url, tmp_path)
    local_cluster.serve(cluster, ["tides", "bot"], replicas={"gpus_per_replica": 1}, engine={"weights": "fp32"})
    adapted = PeftModel.from_pretrained(copy.deepcopy(published.model), tmp_path / "bot-0")
    with OpenAI(base_url=cluster.direct_url, api_key="any", max_retries=0, timeout=60) as client:
        for name, model in (("tides", published.model), ("bot", adapted)):
            answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0)
            assert answer.choices[0].text == greedy(model, published), name
