"""What goes wrong with a real S3 server: wrong and expired keys, a full store, an outage. Nothing committed is lost."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from tests.stores.ceph import Ceph
from tests.stores.s3 import set_environment
from tidepool.checkpoint import Checkpoints, Commit, Incarnation, RunLog, claim_incarnation, verify
from tidepool.errors import StoreAccessError, StoreFullError, StoreUnreachableError
from tidepool.storage import ObjectStore, open_store

pytestmark = pytest.mark.ceph
RUN = "r"
OUTAGE_S = 6.0
_ROLE = "trainer"
_TIMEOUT_S = 60


@pytest.fixture
def store(s3_url: str) -> ObjectStore:
    return open_store(s3_url)


def start(store: ObjectStore) -> tuple[Checkpoints, Incarnation]:
    incarnation = claim_incarnation(store, RUN, {})
    return Checkpoints(store, RUN, incarnation), incarnation


def state(step: int, num_values: int = 300) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((num_values,), float(step))}, "optimizer": {"m": torch.arange(5) * step}}


def check_all_is_there(store: ObjectStore, committed: list[Commit]) -> None:
    """Everything that was committed counts and verifies, and a new incarnation starts from the newest of it."""
    visible = RunLog(store, RUN).visible_commits()
    assert [commit for commit in visible if commit in committed] == committed[::-1]
    for commit in visible:
        verify(store, RUN, commit)
    checkpoints, incarnation = start(store)
    assert incarnation.base is not None
    assert incarnation.base.step >= committed[-1].step
    checkpoints.save(incarnation.base.step + 1, state(1), {})


@contextmanager
def outage(cluster: Ceph) -> Iterator[None]:
    """The gateway is killed now, and started again `OUTAGE_S` later, while the block runs."""
    cluster.stop()
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        # Not before the block ends may the pool go: it waits for the gateway to be back.
        pool.submit(lambda: (started.wait(OUTAGE_S), cluster.start()))
        yield


@pytest.mark.parametrize("changes", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}])
def test_wrong_keys_are_refused_at_once_and_change_nothing(
    store: ObjectStore, ceph_cluster: Ceph, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = [start(store)[0].save(1, state(1), {})]
    with monkeypatch.context() as wrong:
        set_environment(wrong, ceph_cluster.server, **changes)
        stranger = open_store(store.url)
        started = time.monotonic()
        for call in (
            lambda: claim_incarnation(stranger, RUN, {}),
            lambda: verify(stranger, RUN, committed[0]),
            lambda: Checkpoints(stranger, RUN, Incarnation(1, None)).save(2, state(2), {}),
        ):
            with pytest.raises(StoreAccessError, match=r"\(status 403, AccessDenied\): set AWS_ACCESS_KEY_ID"):
                call()
        assert time.monotonic() - started < 5, "it was not asked again and again"
    check_all_is_there(store, committed)


def commit_until(checkpoints: Checkpoints, committed: list[Commit], deadline: float) -> None:
    """Commit step after step, and note what was reported as committed."""
    while time.monotonic() < deadline:
        step = len(committed) + 1
        committed.append(checkpoints.save(step, state(step), {}))


@pytest.fixture
def role(ceph_cluster: Ceph) -> Iterator[str]:
    """The ARN of a role that the user may assume, for sessions that end."""
    trust = {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/tidepool"]}, "Action": ["sts:AssumeRole"]}
    may = {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
    name, version = ("--role-name", _ROLE), "2012-10-17"
    policy = json.dumps({"Version": version, "Statement": [trust]})
    ceph_cluster.admin("role", "create", *name, "--path", "/", "--assume-role-policy-doc", policy)
    ceph_cluster.admin(
        "role-policy", "put", *name, "--policy-name", "all", "--policy-doc", json.dumps({"Version": version, "Statement": [may]})
    )
    yield f"arn:aws:iam:::role/{_ROLE}"
    ceph_cluster.admin("role-policy", "delete", *name, "--policy-name", "all")
    ceph_cluster.admin("role", "delete", *name)


def test_a_session_that_expires_in_the_middle_of_a_run_stops_it_and_loses_nothing(
    store: ObjectStore, ceph_cluster: Ceph, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ceph_cluster.server.client("sts", parameter_validation=False).assume_role(
        RoleArn=role, RoleSessionName="test-session", DurationSeconds=8
    )["Credentials"]
    keys = {"AWS_ACCESS_KEY_ID": "AccessKeyId", "AWS_SECRET_ACCESS_KEY": "SecretAccessKey", "AWS_SESSION_TOKEN": "SessionToken"}
    with monkeypatch.context() as temporary:
        set_environment(temporary, ceph_cluster.server, **{name: session[key] for name, key in keys.items()})
        checkpoints, _ = start(open_store(store.url))
        committed: list[Commit] = []
        with pytest.raises(StoreAccessError, match="have not expired") as caught:
            commit_until(checkpoints, committed, time.monotonic() + _TIMEOUT_S)
        assert committed
        assert session["SessionToken"] not in str(caught.value)
    check_all_is_there(store, committed)


def test_a_full_store_refuses_a_commit_at_any_of_its_objects_and_loses_nothing(store: ObjectStore, ceph_cluster: Ceph) -> None:
    checkpoints, _ = start(store)
    committed = [checkpoints.save(1, state(1), {})]
    bucket = store.url.split("/")[2]
    quota, refused = ("--quota-scope=bucket", f"--bucket={bucket}"), list[str]()
    for room in range(10):
        num_objects = len(list(open_store(f"s3://{bucket}").list("")))
        ceph_cluster.admin("quota", "set", *quota, f"--max-objects={num_objects + room}", "--max-size=-1")
        ceph_cluster.admin("quota", "enable", *quota)
        try:
            committed.append(checkpoints.save(committed[-1].step + 1, state(2), {}))
            break
        except StoreFullError as error:
            refused.append(str(error))
            for commit in RunLog(store, RUN).visible_commits():
                verify(store, RUN, commit)  # reading goes on
        finally:
            ceph_cluster.admin("quota", "disable", *quota)
    for name in ("model.safetensors", "optimizer.safetensors", "manifest.json", "log/3.json"):
        assert any(f"{store.url} is full: it refused runs/{RUN}/" in one and f"{name} (QuotaExceeded)" in one for one in refused), refused
    check_all_is_there(store, committed)


def test_an_outage_within_the_deadline_costs_a_wait_and_nothing_else(store: ObjectStore, ceph_cluster: Ceph) -> None:
    patient = open_store(store.url, deadline_s=60)
    checkpoints, _ = start(patient)
    committed = [checkpoints.save(1, state(1), {})]
    with outage(ceph_cluster):
        started = time.monotonic()
        committed.append(checkpoints.save(2, state(2, num_values=3 * 2**20), {}))  # 12 MiB: in parts
        waited_s = time.monotonic() - started
    assert waited_s > OUTAGE_S - 1
    check_all_is_there(store, committed)


def test_an_outage_beyond_the_deadline_ends_the_run_and_loses_nothing(store: ObjectStore, ceph_cluster: Ceph) -> None:
    checkpoints, _ = start(open_store(store.url, deadline_s=2))
    committed = [checkpoints.save(1, state(1), {})]
    with outage(ceph_cluster), pytest.raises(StoreUnreachableError, match=r"gave no answer for .* within 2 s"):
        checkpoints.save(2, state(2), {})
    check_all_is_there(store, committed)


def test_the_server_killed_while_a_writer_commits_again_and_again(store: ObjectStore, ceph_cluster: Ceph) -> None:
    checkpoints, _ = start(store)
    committed: list[Commit] = []

    def write() -> None:
        for step in range(1, 41):
            committed.append(checkpoints.save(step, state(step), {}))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        for after in (5, 15, 25):
            while len(committed) < after and not writing.done():
                time.sleep(0.001)
            ceph_cluster.stop()
            ceph_cluster.start()
        writing.result()
    assert [commit.step for commit in committed] == list(range(1, 41))
    check_all_is_there(store, committed)
