"""Specs: what is written is checked once, and every refusal says what to do."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.errors import SpecError
from tidepool.specs import DataSpec, RunSpec, ServingSpec, canonical_json, differences, load_spec, parse_spec

RUN = {"store": "memory://specs", "run": "r", "model": {"config": {"model_type": "llama"}}, "dataset": "d", "training": {"steps": 10}}


@pytest.fixture(autouse=True)
def _no_store_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEPOOL_STORE", raising=False)


def refused(spec: dict, kind: type = RunSpec) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec, kind)
    return str(caught.value)


def test_defaults_are_filled_in_and_survive_a_round_trip() -> None:
    spec = parse_spec(RUN, RunSpec)
    assert spec.training.optimizer.schedule == "cosine"
    assert parse_spec(spec.model_dump(mode="json"), RunSpec) == spec


def test_the_digest_depends_on_meaning_alone() -> None:
    reordered = dict(reversed(RUN.items())) | {"seed": 0}
    assert parse_spec(reordered, RunSpec).digest == parse_spec(RUN, RunSpec).digest
    assert parse_spec(RUN | {"seed": 1}, RunSpec).digest != parse_spec(RUN, RunSpec).digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean `seed`?"),
        ({"training": {"steps": 10, "optimiser": {}}}, "training.optimiser: unknown key; did you mean `optimizer`?"),
        ({"training": {"steps": 10, "optimizer": {"learning_rte": 1}}}, "did you mean `learning_rate`?"),
        ({"model": {"base": "b", "lora": {"rnk": 4}}}, "did you mean `rank`?"),
        ({"training": {}}, "training.steps: missing"),
        ({"training": {"steps": 0}}, "training.steps: "),
        ({"training": {"steps": 1, "global_batch_size": 10, "num_shards": 4}}, "must be a multiple of num_shards"),
        (
            {"training": {"steps": 1, "global_batch_size": 16, "num_shards": 8, "micro_batch_size": 4}},
            "must be a multiple of micro_batch_size",
        ),
        ({"training": {"steps": 1, "optimizer": {"warmup_steps": 2}}}, "cannot exceed steps"),
        ({"training": {"steps": 1, "optimizer": {"learning_rate": float("nan")}}}, "training.optimizer.learning_rate"),
        ({"workers": {"num_workers": 9}}, "exceeds training.num_shards"),
        ({"model": {}}, "exactly one of `base`"),
        ({"model": {"base": "b", "config": {"model_type": "llama"}}}, "exactly one of `base`"),
        ({"model": {"config": {"hidden_size": 8}}}, "needs a `model_type`"),
        ({"model": {"config": {"model_type": "llama"}, "lora": {}}}, "`lora` needs a `base`"),
        ({"run": "../up"}, "run: a name is"),
        ({"run": ""}, "run: a name is"),
        ({"store": "ftp://x"}, "s3://bucket/prefix"),
        ({"store": "relative/folder"}, "s3://bucket/prefix"),
        ({"publish": {"model": "Capital"}}, "publish.model: a name is"),
    ],
)
def test_every_refusal_names_the_place_and_the_way_out(change: dict, said: str) -> None:
    assert said in refused(RUN | change)


def test_all_problems_are_told_at_once() -> None:
    message = refused(RUN | {"sed": 1, "seed": -1})
    assert "sed:" in message
    assert "\n  seed:" in message


def test_the_store_comes_from_the_node_if_the_spec_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {key: value for key, value in RUN.items() if key != "store"}
    assert "set TIDEPOOL_STORE" in refused(without)
    monkeypatch.setenv("TIDEPOOL_STORE", "memory://node")
    assert parse_spec(without, RunSpec).store == "memory://node"
    assert parse_spec(RUN, RunSpec).store == "memory://specs"


def test_an_absolute_folder_is_a_store() -> None:
    assert parse_spec(RUN | {"store": "/data/store"}, RunSpec).store == "file:///data/store"


def test_a_tokenizer_has_one_source() -> None:
    data = {"store": "memory://x", "dataset": "d", "inputs": [{"path": "p"}], "tokenizer": {"of": "m", "train": {}}}
    assert "exactly one of `train`" in refused(data, DataSpec)


def test_a_model_is_served_once() -> None:
    assert "once" in refused({"store": "memory://x", "models": ["a", "a"]}, ServingSpec)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: a\nrun: b\n", "stands twice"),
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "expected keys and values, found list"),
        ("", "expected keys and values"),
    ],
)
def test_files_that_are_no_specs(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        load_spec(path, RunSpec)


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Cannot read the spec"):
        load_spec(tmp_path / "none.yaml", RunSpec)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="UTF-8"):
        load_spec(tmp_path / "b.yaml", RunSpec)


def test_differences_name_what_changed() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c: 2 -> 3"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=8
)


@given(st.dictionaries(st.text(), JSON))
def test_canonical_json_forgets_the_order_of_keys(value: dict) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_the_specs_in_the_repository_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_STORE", "memory://node")
    root = Path(__file__).parents[1]
    for path in (root / "demo").glob("*.yaml"):
        load_spec(path, RunSpec)
    for name in ("train", "lora"):
        load_spec(root / "jobs" / f"{name}.yaml", RunSpec)
    load_spec(root / "jobs/prepare.yaml", DataSpec)
