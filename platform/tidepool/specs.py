"""What people write: dataset, run, evaluation and serving specs. YAML in, resolved JSON out.

Invariants:
- A spec that parses can be run as far as its own text tells; every limit is checked here, once.
- Unknown and repeated keys are errors that name the key and the nearest valid one.
- A resolved spec has every default filled in; two specs that mean the same run have the same `digest`.
- A spec never holds a secret: credentials come from the node's environment (see `storage`).

What needs the store, the data or the devices to decide (the newest digest of a dataset, the numerics fingerprint) is
filled in by the part that knows it and kept beside the run.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tidepool.errors import SpecError

STORE_VARIABLE = "TIDEPOOL_STORE"


class Spec(BaseModel):
    """Base of all specs: frozen, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of the whole resolved spec."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same bytes for the same value, for digests and stored documents."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_name(value: str) -> str:
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
    if not value or len(value) > 64 or not letters.issuperset(value) or not value[0].isalnum():
        raise ValueError(
            "a name is 1 to 64 of the characters a-z 0-9 - _ . and starts with a letter or a digit (it becomes a folder of the store)"
        )
    return value


def _check_store(value: str) -> str:
    if value.startswith(("s3://", "memory://", "file:///")):
        return value
    if value.startswith("/"):
        return f"file://{value}"
    raise ValueError(
        "the store must be the same from every node: give s3://bucket/prefix, or file:/// and an absolute path "
        f"(or leave it out and set {STORE_VARIABLE} on the nodes)"
    )


Name = Annotated[str, AfterValidator(_check_name)]
StoreUrl = Annotated[str, AfterValidator(_check_store)]
Count = Annotated[int, Field(ge=1)]


class StoredSpec(Spec):
    """A spec of something that lives in an object store."""

    store: StoreUrl

    @model_validator(mode="before")
    @classmethod
    def _store_of_the_node(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "store" not in value and os.environ.get(STORE_VARIABLE):
            return {**value, "store": os.environ[STORE_VARIABLE]}
        return value


# --- Data ------------------------------------------------------------------------------------------------------------


Loss = Literal["assistant", "completion", "all"]


class InputSpec(Spec):
    """A file or folder to read, here or behind a URL (s3://, file://, whatever fsspec reads).

    `text`: each file is a document. `jsonl` and `parquet`: each row is one (see `data.rows`). `loss`: which tokens of a row are
    learned. `weight`: how often each document is read in an epoch (2.5: twice, and a fixed half of them once more).
    """

    path: str
    glob: str = "**/*"
    format: Literal["text", "jsonl", "parquet"] = "text"
    loss: Loss = "assistant"
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if "://" in self.path and "@" in urlsplit(self.path).netloc:
            raise ValueError("`path` holds a user or a password: credentials come from the environment where the job runs")
        return self


class TrainTokenizerSpec(Spec):
    """Train a byte-level BPE tokenizer on (a sample of) the inputs."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 4096
    max_bytes: Count = 32_000_000


class TokenizerSpec(Spec):
    """Where the tokenizer comes from: exactly one of `train` and `of` (a model: registry name, path, store URL, hub name).

    `chat_template` takes the place of its own: a path, or the template's text (which holds `{{` or `{%`).
    """

    train: TrainTokenizerSpec | None = None
    of: str | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.train is None) == (self.of is None):
            raise ValueError("give exactly one of `train` (a new tokenizer) and `of` (the tokenizer of a model)")
        return self


class DataSpec(StoredSpec):
    """A dataset to prepare: `jobs/prepare.py` turns it into token shards."""

    dataset: Name
    inputs: Annotated[list[InputSpec], Field(min_length=1)]
    tokenizer: TokenizerSpec
    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    held_out_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = 0.01
    max_skipped_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    samples_per_row_group: Count = 64
    row_groups_per_shard: Count = 64


# --- Training --------------------------------------------------------------------------------------------------------


class LoraSpec(Spec):
    """A low-rank adapter (Hu et al. 2021) to train instead of the whole model."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ModelSpec(Spec):
    """What to train: `base` (registry name, path, store URL or hub name) or a new model from `config`."""

    base: str | None = None
    config: dict[str, Any] | None = None
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.base is None) == (self.config is None):
            raise ValueError("give exactly one of `base` (a model to start from) and `config` (a new model's configuration)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, for example llama")
        if self.config is not None and self.lora is not None:
            raise ValueError("`lora` needs a `base`: an adapter on random weights is of no use")
        return self


class OptimizerSpec(Spec):
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and decay of the learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    kernel: Literal["fused", "foreach", "single"] = "fused"


class TrainingSpec(Spec):
    """The step loop. The global batch is cut into `num_shards` logical shards of equal size, whoever computes them.

    `reduction`: `exact` gives the same bits for every number of workers, `fast` (a plain all-reduce) other ones for each.
    """

    steps: Count
    global_batch_size: Count = 16
    num_shards: Count = 8
    micro_batch_size: Count = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    reduction: Literal["exact", "fast"] = "exact"
    optimizer: OptimizerSpec = OptimizerSpec()
    evaluate_every_steps: Count = 100
    evaluate_num_samples: Count = 64

    @property
    def shard_size(self) -> int:
        """Samples per logical shard."""
        return self.global_batch_size // self.num_shards

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch_size % self.num_shards:
            raise ValueError(f"global_batch_size ({self.global_batch_size}) must be a multiple of num_shards ({self.num_shards})")
        if self.shard_size % self.micro_batch_size:
            raise ValueError(
                f"a shard of {self.shard_size} samples (global_batch_size / num_shards) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) cannot exceed steps ({self.steps})")
        return self


class CheckpointSpec(Spec):
    """How often to commit, and how many commits to keep.

    Training goes on while the store takes a snapshot, for up to `max_lag_s`; then it waits. With 0, it waits for each commit.
    """

    every_steps: Count = 50
    keep: Count = 3
    max_lag_s: Annotated[float, Field(ge=0)] = 300


class WorkersSpec(Spec):
    """One replica group: the workers of a Ray Train worker group, and what each of them gets.

    `max_restarts` bounds how many groups may fail, one after the other, without a new step in between.
    """

    num_workers: Count = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    threads_per_worker: Count = 1
    max_restarts: Annotated[int, Field(ge=0)] = 8


class ElasticSpec(Spec):
    """How many replica groups train the run: `min` are waited for, and more join as the cluster has room, up to `max`."""

    min: Count = 1
    max: Count = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max})")
        return self


class PoolSpec(Spec):
    """What the run is to the pool (docs/pool.md): whose quota it draws on, how well it is guaranteed its min, and where it may run.

    `labels`: `key=value` that a node must have, all of them.
    """

    project: Name = "default"
    tier: Literal["premium", "standard", "basic"] = "standard"
    priority: int = 0
    labels: list[str] = []

    @field_validator("labels")
    @classmethod
    def _key_and_value(cls, labels: list[str]) -> list[str]:
        if wrong := [label for label in labels if label.count("=") != 1]:
            raise ValueError(f"a label is key=value (got {', '.join(wrong)})")
        return labels


class PublishSpec(Spec):
    """The registry name that the result is published under, and the alias that moves to it.

    `every_steps`: publish while the run goes on, too, wherever the held-out loss is measured at such a step. `max_held_out_loss`: the
    alias moves only to versions whose held-out loss is not above this.
    """

    model: Name
    alias: Name | None = "production"
    every_steps: Count | None = None
    max_held_out_loss: Annotated[float, Field(gt=0)] | None = None


class RunSpec(StoredSpec):
    """One training run; the same `run` name resumes it."""

    run: Name
    model: ModelSpec
    dataset: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    training: TrainingSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    workers: WorkersSpec = WorkersSpec()
    elastic: ElasticSpec = ElasticSpec()
    pool: PoolSpec = PoolSpec()
    publish: PublishSpec | None = None

    @model_validator(mode="after")
    def _measured_first(self) -> Self:
        every = self.publish.every_steps if self.publish else None
        if every is not None and every % self.training.evaluate_every_steps:
            raise ValueError(
                f"publish.every_steps ({every}) must be a multiple of training.evaluate_every_steps "
                f"({self.training.evaluate_every_steps}): what is published has been measured"
            )
        return self

    @model_validator(mode="after")
    def _enough_shards(self) -> Self:
        num_workers = self.elastic.max * self.workers.num_workers
        if num_workers > self.training.num_shards:
            groups = f"elastic.max ({self.elastic.max}) x " if self.elastic.max > 1 else ""
            raise ValueError(
                f"{groups}workers.num_workers ({self.workers.num_workers}) exceeds training.num_shards ({self.training.num_shards}): "
                "the extra workers would have nothing to compute"
            )
        return self


class EvaluationSpec(StoredSpec):
    """A model or adapter (registry name, path, store URL, hub name) to measure on a dataset's held-out tokens."""

    model: str
    dataset: str
    num_samples: Count = 64
    batch_size: Count = 8


# --- Serving ---------------------------------------------------------------------------------------------------------


class EngineSpec(Spec):
    """Limits of one engine replica.

    `max_batch_size` answers run at once; a step computes up to `max_step_tokens` tokens of prompts and answers together (never fewer
    than `max_batch_size`), with up to `max_adapters` adapters. `adapters_gb`: memory for all that are loaded (default: a tenth of what is
    free). `cache_gb`: memory for keys and values (10^9 bytes; default: what that many answers can use, and a share of what is free at
    most). `weights`: `auto` is fp32 on a CPU and bf16 on a GPU; `int8` rounds the weights, on CPUs. `batch_invariant`: a request gets the
    same bits in any company, more slowly; on CPUs. `speculative_tokens`: so many tokens of an answer are guessed at a time from what its
    request has said before, and verified in one step (0: none); no token changes by it.
    """

    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    max_step_tokens: Count = 512
    max_sequence_length: Count | None = None
    max_queued_requests: Count = 256
    max_adapters: Count = 32
    adapters_gb: Annotated[float, Field(gt=0)] | None = None
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    weights: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    batch_invariant: bool = False
    speculative_tokens: Annotated[int, Field(ge=0, le=16)] = 0
    threads: Count = 1


class ScaleSpec(Spec):
    """Between how many replicas a base model has as its traffic goes, and when: `min` 0 lets it go to none while nobody asks.

    `ttft_s` is the time to the first token that replicas are added for. `up_after_s`, `down_after_s`, `zero_after_s`: how long more are
    needed before one comes, fewer before one goes, and none before the last one goes.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Count
    ttft_s: Annotated[float, Field(gt=0)] = 1.0
    up_after_s: Annotated[float, Field(ge=0)] = 1.0
    down_after_s: Annotated[float, Field(ge=0)] = 60.0
    zero_after_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max})")
        return self


class ReplicasSpec(Spec):
    """Replicas of each base model's deployment (so many, or as `scale` says), what each of them gets, and whose quota they draw on.

    The pool counts whole GPUs, or CPUs of replicas without: a part of one is one.
    """

    num_replicas: Count = 1
    scale: ScaleSpec | None = None
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    project: Name = "default"
    priority: int = 0


class GatewaySpec(Spec):
    """Whom the gateway lets in, and how much a request may ask for. `max_new_tokens` None: as many as the context has room for.

    `replicas`: how many gateways there are; limits count in each of them. `port`: one that they listen on themselves, on their nodes,
    beside Serve's proxy.
    """

    replicas: Count = 1
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    require_keys: bool = False
    keys_max_age_s: Annotated[float, Field(gt=0)] = 900.0
    max_body_bytes: Count = 8_388_608
    max_new_tokens: Count | None = None
    max_requests: Count = 4096
    timeout_s: Annotated[float, Field(gt=0)] = 600.0


class ServingSpec(StoredSpec):
    """The models to serve, by registry name (`name`, `name@version` or `name:alias`); adapters bring their base along."""

    models: Annotated[list[str], Field(min_length=1)]
    engine: EngineSpec = EngineSpec()
    replicas: ReplicasSpec = ReplicasSpec()
    gateway: GatewaySpec = GatewaySpec()
    resolve_ttl_s: Annotated[float, Field(ge=0)] = 1.0

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: list[str]) -> list[str]:
        if len(set(models)) != len(models):
            raise ValueError("each model can be listed once")
        return models


# --- Parsing ---------------------------------------------------------------------------------------------------------

SpecT = TypeVar("SpecT", bound=Spec)


def load_spec(path: str | Path, kind: type[SpecT]) -> SpecT:
    """Read a YAML file and check it. Raises `SpecError` with every problem found, a line each."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise SpecError(f"Cannot read the spec {path}: {error.strerror}. Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not a text file in UTF-8. Give the path of a YAML file.") from error
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not valid YAML: {error}") from error
    return parse_spec(value, kind, source=str(path))


def parse_spec(value: Any, kind: type[SpecT], source: str = "spec") -> SpecT:
    """Check a mapping against a kind of spec. Raises `SpecError` with every problem found, a line each."""
    if not isinstance(value, Mapping):
        raise SpecError(f"{source}: expected keys and values, found {type(value).__name__}. See jobs/*.yaml for examples.")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(item, kind)}" for item in error.errors(include_url=False))
        raise SpecError(f"{source} cannot be used:\n{problems}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two resolved specs, as lines `a.b: old -> new`."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key wherever it stands."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _problem(item: Any, kind: type[Spec]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "(whole spec)"
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(kind, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys are {', '.join(sorted(valid))}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing" and item["loc"] == ("store",):
        return f"store: missing; add `store: s3://bucket/prefix` to the spec, or set {STORE_VARIABLE} where the cluster starts"
    if item["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    return f"{where}: {message}" + (f" (got {given!r})" if isinstance(given, str | int | float) else "")


def _valid_keys(kind: type[Spec], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at `location` below `kind`, found through the annotations of the fields on the way."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:  # an index of a list, or a branch of a union that pydantic names itself
            continue
        kind = next(iter(_specs_in(field.annotation)), kind)
    return list(kind.model_fields)


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in getattr(annotation, "__args__", ()) for spec in _specs_in(argument)]
