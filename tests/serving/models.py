"""A tiny base model and adapters on it, published in a store's registry as a training run would."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidepool.models import ModelSource, add_lora, build_model, export_adapter, export_model, train_tokenizer
from tidepool.registry import ModelVersion, Registry
from tidepool.specs import LoraSpec
from tidepool.storage import open_store

TEXT = "the tide comes in and the pool fills; the tide goes out and the pool keeps what it holds. "
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Published:
    """What is in the store at `store_url`: `base`, and adapters of it whose answers differ."""

    store_url: str
    model: Any
    tokenizer: Any
    base: ModelVersion
    adapters: Sequence[ModelVersion]


def publish(
    store_url: str, folder: Path, base: str = "tides", adapter: str = "bot", num_adapters: int = 1, context_length: int = 128
) -> Published:
    """Publish a base and `num_adapters` versions of one adapter."""
    tokenizer = train_tokenizer([TEXT] * 4, vocab_size=300)
    model = build_model(CONFIG | {"max_position_embeddings": context_length}, len(tokenizer), seed=1, tokenizer=tokenizer)
    export_model(model, tokenizer, folder / base)
    version = Registry(open_store(store_url)).publish(base, "full", folder / base, lineage={"run": base}, metrics={})
    published = Published(store_url, model, tokenizer, version, ())
    adapters = [publish_adapter(published, folder / f"{adapter}-{seed}", adapter, seed) for seed in range(num_adapters)]
    return Published(store_url, model, tokenizer, version, adapters)


def publish_adapter(published: Published, folder: Path, name: str, seed: int) -> ModelVersion:
    """Publish an adapter whose weights the seed decides as the next version of a name."""
    base = ModelSource(published.base.ref, published.base.digest, published.base)
    adapted = add_lora(copy.deepcopy(published.model), LoraSpec(rank=4), seed, base.ref)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    export_adapter(adapted, published.tokenizer, folder, base)
    registry = Registry(open_store(published.store_url))
    return registry.publish(name, "adapter", folder, base=base.ref, base_digest=base.digest, lineage={"seed": seed}, metrics={})


def publish_base(published: Published, folder: Path, name: str, seed: int) -> ModelVersion:
    """Publish a whole model whose weights the seed decides as the next version of a name."""
    model = build_model(CONFIG | {"max_position_embeddings": 512}, len(published.tokenizer), seed=seed, tokenizer=published.tokenizer)
    export_model(model, published.tokenizer, folder)
    return Registry(open_store(published.store_url)).publish(name, "full", folder, lineage={"seed": seed}, metrics={})
