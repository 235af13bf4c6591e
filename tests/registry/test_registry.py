"""The registry: publishing whatever dies when, resolving, aliases that two people move at once, verified fetching."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tidepool.errors import AliasMovedError, RegistryError, StoreError
from tidepool.registry import FileEntry, ModelVersion, Registry, describe_folder, files_digest
from tidepool.storage import ObjectStore, append, open_store


@pytest.fixture
def store(store_url: str) -> ObjectStore:
    return open_store(store_url)


@pytest.fixture
def registry(store: ObjectStore) -> Registry:
    return Registry(store)


def _folder(path: Path, content: str = "weights") -> Path:
    (path / "sub").mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_text(content)
    (path / "config.json").write_text("{}")
    (path / "sub" / "empty").write_text("")
    return path


def _publish(registry: Registry, path: Path, content: str = "weights", **options: Any) -> ModelVersion:
    options = {"lineage": {"run": content}, "metrics": {"loss": 1.5}} | options
    return registry.publish("bot", "full", _folder(path / content, content), **options)


def test_what_is_published_is_found_and_fetched(registry: Registry, any_store_url: str, tmp_path: Path) -> None:
    registry = Registry(open_store(any_store_url))
    folder = _folder(tmp_path / "a")
    version = registry.publish("bot", "adapter", folder, base="big@3", base_digest="d" * 64, lineage={"run": "r"}, metrics={"loss": 0.5})
    assert (version.ref, version.base, version.digest) == ("bot@1", "big@3", files_digest(describe_folder(folder)))
    for ref in ("bot", "bot@1", "bot:production"):
        assert Registry(open_store(any_store_url)).resolve(ref) == version
    fetched = registry.fetch(version, tmp_path / "cache")
    assert describe_folder(fetched) == describe_folder(folder) == version.files
    assert fetched == registry.fetch(version, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == [version.digest]


def test_versions_count_up_and_aliases_follow(registry: Registry, tmp_path: Path) -> None:
    assert [_publish(registry, tmp_path, c, alias=a).number for c, a in (("a", "production"), ("b", "canary"), ("c", None))] == [1, 2, 3]
    assert registry.aliases("bot") == {"canary": 2, "production": 1}
    assert [registry.resolve(ref).number for ref in ("bot", "bot:canary", "bot@3")] == [1, 2, 3]
    assert registry.names() == ["bot"]


def test_without_an_alias_the_name_means_the_newest(registry: Registry, tmp_path: Path) -> None:
    for content in "ab":
        _publish(registry, tmp_path, content, alias=None)
    assert registry.resolve("bot").number == 2


def test_the_same_files_of_the_same_run_are_one_version(registry: Registry, tmp_path: Path) -> None:
    first = _publish(registry, tmp_path, "a")
    assert _publish(registry, tmp_path, "a", metrics={"loss": 1.5}) == first
    assert _publish(registry, tmp_path, "a", lineage={"run": "another"}).number == 2
    assert len(registry.history("bot")) == 2


def test_publishing_again_does_not_undo_a_rollback(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path, "a")
    _publish(registry, tmp_path, "b")
    registry.rollback("bot")
    _publish(registry, tmp_path, "b")
    assert registry.resolve("bot").number == 1


class _Dying:
    """A store whose n-th call from now raises, before or after it did its work; later ones too."""

    def __init__(self, store: ObjectStore, calls: int, after: bool) -> None:
        self._store, self._left, self._after = store, calls, after
        self.url = store.url

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left < 0 and not (self._after and self._left == -1):
                raise StoreError("dead")
            result = getattr(self._store, name)(*arguments)
            result = list(result) if name == "list" else result
            if self._left < 0:
                raise StoreError("dead")
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_publisher_that_dies_at_any_call_leaves_a_whole_version_or_none(
    registry: Registry, store: ObjectStore, tmp_path: Path, after: bool
) -> None:
    _publish(registry, tmp_path, "old")
    deaths = 0
    for calls in range(100):
        content = f"new-{calls}"
        try:
            _publish(Registry(_Dying(store, calls, after)), tmp_path, content)
        except StoreError:
            deaths += 1
            for version in registry.versions("bot"):
                registry.fetch(version, tmp_path / "cache")
            registry.resolve("bot")
            number = _publish(registry, tmp_path, content).number
            same = [version for version in registry.versions("bot") if version.lineage["run"] == content]
            assert [version.number for version in same] == [number], "one version, however often it was tried"
            assert registry.resolve("bot").number == number
        else:
            break
    assert deaths > 8


def test_two_publishers_at_once_get_different_numbers(any_store_url: str, tmp_path: Path) -> None:
    numbers: list[int] = []
    barrier = threading.Barrier(4)

    def publish(content: str) -> None:
        barrier.wait()
        numbers.append(_publish(Registry(open_store(any_store_url)), tmp_path, content, alias=None).number)

    threads = [threading.Thread(target=publish, args=(f"c{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4]


def test_of_two_who_move_an_alias_at_once_one_is_told(
    registry: Registry, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in "abc":
        _publish(registry, tmp_path, content, alias=None)
    registry.promote("bot", 1)
    put = store.put_if_absent

    def late(key: str, data: Any) -> None:
        monkeypatch.undo()
        Registry(store).promote("bot", 2)  # somebody else, between our look and our move
        put(key, data)

    for move in (lambda: registry.promote("bot", 3), lambda: registry.rollback("bot")):
        monkeypatch.setattr(store, "put_if_absent", late)
        with pytest.raises(AliasMovedError, match="look where it points now"):
            move()
        assert registry.resolve("bot").number == 2
        registry.promote("bot", 1)


def test_promoting_with_an_expectation(registry: Registry, tmp_path: Path) -> None:
    for content in "ab":
        _publish(registry, tmp_path, content, alias=None)
    with pytest.raises(AliasMovedError, match="points to nothing yet"):
        registry.promote("bot", 1, expected=2)
    registry.promote("bot", 1)
    with pytest.raises(AliasMovedError, match=r"points to bot@1, not to bot@2"):
        registry.promote("bot", 2, expected=2)
    registry.promote("bot", 2, expected=1)
    assert [entry.number for entry in registry.history("bot")] == [1, 2]


def test_rolling_back_step_by_step(registry: Registry, tmp_path: Path) -> None:
    for content in "abc":
        _publish(registry, tmp_path, content)
    assert registry.rollback("bot").number == 2
    assert registry.rollback("bot").number == 1
    with pytest.raises(RegistryError, match="no version to go back to"):
        registry.rollback("bot")
    registry.promote("bot", 3)
    assert registry.rollback("bot").number == 1
    assert [entry.number for entry in registry.history("bot")] == [1, 2, 3, 2, 1, 3, 1]
    with pytest.raises(RegistryError, match="does not exist"):
        registry.rollback("bot", "canary")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("bto", "did you mean bot"),
        ("zzz", "there are: bot"),
        ("bot@9", "No version 9 of bot; its versions: 1"),
        ("bot@x", "not a version"),
        ("bot:cnary", "no alias 'cnary'; its aliases: production"),
        ("../x", "cannot be the name"),
        ("bot:../x", "cannot be the name"),
        ("", "cannot be the name"),
    ],
)
def test_names_that_do_not_resolve(registry: Registry, tmp_path: Path, ref: str, message: str) -> None:
    _publish(registry, tmp_path)
    with pytest.raises(RegistryError, match=message):
        registry.resolve(ref)


def test_promoting_what_is_not_there(registry: Registry, tmp_path: Path) -> None:
    _publish(registry, tmp_path)
    with pytest.raises(RegistryError, match="No version 2"):
        registry.promote("bot", 2)
    with pytest.raises(RegistryError, match="cannot be the name"):
        registry.promote("bot", 1, "a/b")


def test_pickles_and_empty_folders_are_not_published(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match="no files to publish"):
        registry.publish("bot", "full", tmp_path / "empty", lineage={}, metrics={})
    folder = _folder(tmp_path / "a")
    (folder / "sub" / "optimizer.pt").write_text("x")
    with pytest.raises(RegistryError, match=r"sub/optimizer.pt: only safetensors"):
        registry.publish("bot", "full", folder, lineage={}, metrics={})
    assert registry.names() == []


def test_files_that_two_versions_share_are_stored_once(registry: Registry, store: ObjectStore, tmp_path: Path) -> None:
    _publish(registry, tmp_path, "a")
    _publish(registry, tmp_path, "b")
    assert len(list(store.list("blobs/"))) == 4  # two weights, one config, one empty file


def test_a_damaged_or_missing_file_is_never_handed_out(registry: Registry, store: ObjectStore, tmp_path: Path) -> None:
    version = _publish(registry, tmp_path)
    weights = next(file for file in version.files if file.path == "model.safetensors")
    store.delete(f"blobs/{weights.sha256}")
    with pytest.raises(RegistryError, match=r"model.safetensors of bot@1 is missing"):
        registry.fetch(version, tmp_path / "cache")
    store.put_if_absent(f"blobs/{weights.sha256}", b"w" * weights.size_bytes)
    with pytest.raises(RegistryError, match=r"model.safetensors of bot@1 is not what was published"):
        registry.fetch(version, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.name not in (".locks", ".uses")] == []


def test_a_blob_of_the_wrong_size_is_told_when_publishing(registry: Registry, store: ObjectStore, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    store.put_if_absent(f"blobs/{describe_folder(folder)[1].sha256}", b"torn")
    with pytest.raises(StoreError, match="delete that object and publish again"):
        registry.publish("bot", "full", folder, lineage={}, metrics={})


def test_a_version_that_names_files_outside_its_folder_is_refused(registry: Registry, store: ObjectStore, tmp_path: Path) -> None:
    version = _publish(registry, tmp_path)
    entry = FileEntry("../../escaped", version.files[0].size_bytes, version.files[0].sha256)
    value = version.to_json() | {"files": [{"path": entry.path, "size_bytes": entry.size_bytes, "sha256": entry.sha256}]}
    number = append(store, "models/bot/versions/", value | {"digest": files_digest([entry])}).number
    with pytest.raises(RegistryError, match="outside its folder"):
        registry.fetch(registry.resolve(f"bot@{number}"), tmp_path / "deep" / "cache")
    assert not list(tmp_path.rglob("escaped"))


def test_a_damaged_entry_is_told(registry: Registry, store: ObjectStore, tmp_path: Path) -> None:
    _publish(registry, tmp_path)
    store.put_if_absent("models/bot/versions/2.json", json.dumps({"kind": "full"}).encode())
    store.put_if_absent("models/bot/versions/3.json", b"{")
    for number in (2, 3):
        with pytest.raises(RegistryError, match=f"Version {number} of bot in the registry is damaged"):
            registry.resolve(f"bot@{number}")
    assert registry.resolve("bot").number == 1


# --- Canaries --------------------------------------------------------------------------------------------------------


def test_a_canary_stands_beside_the_version_of_an_alias_until_it_is_promoted_or_rolled_back(registry: Registry, tmp_path: Path) -> None:
    for content in "abc":
        _publish(registry, tmp_path, content, alias=None)
    registry.promote("bot", 1)
    registry.promote("bot", 2, canary_weight=0.25)
    meaning = registry.meaning("bot")
    assert (meaning.version.number, meaning.canary and meaning.canary.number, meaning.weight) == (1, 2, 0.25)
    assert registry.resolve("bot").number == registry.aliases("bot")["production"] == 1
    registry.promote("bot", 3, canary_weight=0.5)
    assert registry.rollback("bot").number == 1
    assert registry.meaning("bot") == meaning, "the canary before"
    registry.promote("bot", 2, expected=1)
    assert (registry.meaning("bot").version.number, registry.meaning("bot").canary) == (2, None)
    registry.rollback("bot")
    registry.rollback("bot")
    assert (registry.meaning("bot").version.number, registry.meaning("bot").canary) == (1, None)
    assert registry.meaning("bot@2").version.number == 2


@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0, float("nan")])
def test_a_canary_that_makes_no_sense_is_refused(registry: Registry, tmp_path: Path, weight: float) -> None:
    for content in "ab":
        _publish(registry, tmp_path, content, alias=None)
    with pytest.raises(RegistryError, match="points to nothing yet"):
        registry.promote("bot", 2, canary_weight=0.5)
    registry.promote("bot", 1)
    with pytest.raises(RegistryError, match="between 0 and 1"):
        registry.promote("bot", 2, canary_weight=weight)
    with pytest.raises(RegistryError, match="itself"):
        registry.promote("bot", 1, canary_weight=0.5)
    with pytest.raises(AliasMovedError):
        registry.promote("bot", 2, canary_weight=0.5, expected=2)
    assert len(registry.history("bot")) == 1
