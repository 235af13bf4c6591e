"""Quotas in the store: the newest document counts, and two who change it at once lose nothing."""

import pytest

from tidepool.errors import StoreError
from tidepool.messages import Quota
from tidepool.pool import quotas
from tidepool.pool.quotas import change_quota, read_quotas
from tidepool.storage import ObjectStore, append, open_store


@pytest.fixture
def store(any_store_url: str) -> ObjectStore:
    return open_store(any_store_url)


def test_each_project_has_its_newest_quota(store: ObjectStore) -> None:
    assert read_quotas(store) == ()
    change_quota(store, Quota("sea", training_gpus=8))
    change_quota(store, Quota("lake", serving_gpus=0))
    change_quota(store, Quota("sea", 2, 4))
    assert read_quotas(store) == (Quota("lake", serving_gpus=0), Quota("sea", 2, 4))
    change_quota(store, Quota("lake"))
    assert read_quotas(store) == (Quota("sea", 2, 4),)


def test_two_who_change_at_once_lose_nothing(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = quotas._write

    def after_another(*arguments: object) -> None:
        monkeypatch.setattr(quotas, "_write", write)
        change_quota(store, Quota("lake", 1, 1))
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(quotas, "_write", after_another)
    change_quota(store, Quota("sea", 2, 2))
    assert read_quotas(store) == (Quota("lake", 1, 1), Quota("sea", 2, 2))


def test_a_document_that_cannot_be_understood_is_told_by_its_key(store_url: str) -> None:
    store = open_store(store_url)
    append(store, "pool/quotas/", {"quotas": [{"project": "sea", "gpus": 3}]})
    with pytest.raises(StoreError, match=r"pool/quotas/1.json cannot be understood"):
        read_quotas(store)
