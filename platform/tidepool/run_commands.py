"""`tidepool runs`: the runs of a store, what a cluster says of those that train in it now, and what they are asked for there.

`list` and `show` tell; `resize`, `pause` and `stop` ask a run that trains; `resume` submits one that does not. What is told comes
from the store (`spec.json`, the log, `result.json`) and, for a run that trains, from its coordinator. The text and the JSON hold
the same facts. A run that trains in a cluster that was not asked is told as not running, with a word on that. A script under
`python -m tidepool.run` is a process of its own, which nobody can be asked about: its run is finished or it is not.
"""

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from tidepool.errors import ClusterError, CorruptCheckpointError, RunError, SpecError, StoreError
from tidepool.run_queue import Ending, call_off, read_queued
from tidepool.storage import ObjectStore, find_json
from tidepool.table import span, table
from tidepool.training.live_runs import Look
from tidepool.training.pauses import paused_step

if TYPE_CHECKING:
    from tidepool.checkpoint import Commit, Incarnation

Facts = dict[str, Any]


class Cluster(Protocol):
    """What is asked of a Ray cluster. All but `look` raise `ClusterError` where none answers, and `RunError` for a run that it has not."""

    def look(self) -> Look:
        """What trains in it."""
        ...

    def resize(self, run: str, num_groups: int) -> int:
        """Ask for so many replica groups; returns how many it will be."""
        ...

    def stop(self, run: str, pause: bool) -> int:
        """Ask a run to commit and to end or pause; returns the step that it holds."""
        ...

    def submit(self, spec: Mapping[str, Any]) -> str:
        """Submit a job that trains by a spec; returns its id."""
        ...


_NUM_READERS = 8
_PINS = ("dataset", "base", "base_digest")
_ACCOUNT = ("started_at", "wall_s", "goodput", "useful_s", "rest", "quorum_changes", "recomputed_steps")
_LIVE = ("quorum", "is_stepping", "stopping", "step", "incarnation", "committed", "wanted_groups", "groups")
_WORKER = ("group", "rank_in_group", "rank", "node_ip", "pid", "phase", "step", "score")
_SCRIPT = ("script", "arguments", "sha256", "device", "torch")
_SHA256S = ("weights_sha256", "optimizer_sha256", "history_sha256")
_RESULT = ("samples", "first_loss", "last_loss", "held_out_loss_before", "held_out_loss_after", "published", *_SHA256S)


def add_run_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    store_of: Callable[[argparse.Namespace], ObjectStore],
    cluster: Callable[[], Cluster],
) -> list[argparse.ArgumentParser]:
    """Add the commands to those of `tidepool runs`; each sets `run`. `cluster` finds the one to ask. Returns those with a store."""
    listing = commands.add_parser("list", help="all runs: state, step, newest commit, replica groups, goodput, what was published")
    listing.set_defaults(run=lambda options: _list(options, store_of(options), cluster().look))
    show = commands.add_parser("show", help="a run: what it was made from, its commits, workers, times and result")
    show.add_argument("name", metavar="RUN", help="the `run` of its spec")
    show.set_defaults(run=lambda options: _show(options, store_of(options), cluster().look))
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="one JSON document in place of the text")
    resize = commands.add_parser("resize", help="give a run more replica groups or fewer, within its spec's `elastic`")
    resize.set_defaults(run=lambda options: _resize(options, cluster()))
    pause = commands.add_parser(
        "pause", help="let a run commit where it is and leave the cluster; `resume` continues it, here or elsewhere"
    )
    pause.set_defaults(run=lambda options: _stop(options, lambda: store_of(options), cluster(), is_pause=True))
    stop = commands.add_parser("stop", help="let a run commit where it is and end its job")
    stop.set_defaults(run=lambda options: _stop(options, lambda: store_of(options), cluster(), is_pause=False))
    resume = commands.add_parser("resume", help="submit a run that was paused, stopped or lost, from its newest commit")
    resume.set_defaults(run=lambda options: _resume(options, store_of(options), cluster()))
    for command in (resize, pause, stop, resume):
        command.add_argument("name", metavar="RUN", help="the `run` of its spec")
    resize.add_argument("num_groups", metavar="GROUPS", type=int, help="how many replica groups")
    return [listing, show, pause, stop, resume]


def _resize(options: argparse.Namespace, cluster: Cluster) -> None:
    if options.num_groups < 1:
        raise RunError("A run has at least one replica group; `tidepool runs pause` takes it out of the cluster.")
    given = cluster.resize(options.name, options.num_groups)
    bound = "" if given == options.num_groups else f" (its spec's `elastic` allows no other number near {options.num_groups})"
    print(f"Run {options.name} is to have {_count(given, 'replica group')}{bound}. `tidepool runs show {options.name}` tells when it has.")


def _stop(options: argparse.Namespace, store_of: Callable[[], ObjectStore], cluster: Cluster, is_pause: bool) -> None:
    name = options.name
    try:
        step = cluster.stop(name, is_pause)
    except RunError:
        if not _is_called_off(name, "paused" if is_pause else "stopped", store_of, cluster):
            raise
        print(f"Run {name} has no driver now, and the pool starts none any more; `tidepool runs resume {name}` continues it.")
        return
    then = f"`tidepool runs resume {name}` continues it" if is_pause else "submitting it again continues it"
    print(f"Run {name}, now at step {step}, commits at its next step and {'leaves the cluster' if is_pause else 'ends'}; {then}.")


def _is_called_off(name: str, how: Ending, store_of: Callable[[], ObjectStore], cluster: Cluster) -> bool:
    """Take a run without a driver off the list of those that are wanted; returns whether it was such a run."""
    with suppress(SpecError):  # no store is known here
        return name not in cluster.look().runs and call_off(store_of(), name, how)
    return False


def _resume(options: argparse.Namespace, store: ObjectStore, cluster: Cluster) -> None:
    name = options.name
    queued = read_queued(store, name) if "/" not in name else None
    if queued is None and ("/" in name or not any(store.list(f"runs/{name}/"))):
        raise _unknown(name, store)
    if _document(store, f"runs/{name}/script.json") is not None:
        raise RunError(
            f"Run {name} is a script's: start it again with the command that began it (`python -m tidepool.run --run {name} ...`)."
        )
    stored, seen = _document(store, f"runs/{name}/spec.json"), cluster.look()
    if seen.problem:
        raise ClusterError(f"Run {name} cannot be resumed: {seen.problem}.")
    if name in seen.runs:
        raise RunError(f"Run {name} is being trained in this cluster already.")
    if _document(store, f"runs/{name}/result.json") is not None:
        raise RunError(f"Run {name} is finished; give another `run` name to train again.")
    spec = stored["spec"] if stored is not None else queued.spec if queued is not None else None
    if spec is None:
        raise RunError(f"Run {name} was stopped before its first worker had begun: submit its spec again with `ray job submit`.")
    job = cluster.submit({**spec, "store": store.url})
    print(f"Run {name} goes on as job {job}: `ray job logs --follow {job}` shows it, `tidepool runs show {name}` where it is.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(options: argparse.Namespace, store: ObjectStore, look: Callable[[], Look]) -> None:
    seen, now = _look(look), datetime.now(UTC)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        runs = [_summary(one, seen, now) for one in pool.map(lambda name: _read(store, name, seen), _names(store))]
    if options.json:
        _print_json(store, seen, {"runs": runs})
    elif not runs:
        print("No run has begun in this store yet. This begins one (jobs/README.md has more):")
        print("  ray job submit --working-dir . -- python jobs/train.py jobs/train.yaml")
    else:
        rows = [("RUN", "STATE", "STEP", "COMMIT", "GROUPS", "GOODPUT", "PUBLISHED"), *map(_row, runs)]
        print("\n".join([*table(rows), *_doubt(seen, runs)]))


def _show(options: argparse.Namespace, store: ObjectStore, look: Callable[[], Look]) -> None:
    if "/" in options.name or not any(store.list(f"runs/{options.name}/")):
        raise _unknown(options.name, store)
    seen, now = _look(look), datetime.now(UTC)
    run = _details(_read(store, options.name, seen), seen, now)
    if options.json:
        _print_json(store, seen, {"run": run})
    else:
        print("\n".join([*_lines(run), *_doubt(seen, [run])]))


def _names(store: ObjectStore) -> list[str]:
    return sorted({info.key.split("/")[1] for info in store.list("runs/")})


def _unknown(name: str, store: ObjectStore) -> RunError:
    known = _names(store)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known) or 'none yet'}."
    return RunError(f"No run {name!r} in {store.url}; {hint}")


def _look(look: Callable[[], Look]) -> Look:
    """Ask the cluster, and load what reads the store meanwhile: both take seconds."""
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(look)
        import tidepool.checkpoint  # noqa: F401  it brings torch, which most commands do without

        return seen.result()


# --- From the store and the cluster to the facts --------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """What the store has of a run."""

    name: str
    spec: Facts | None
    """`spec.json`, None until the first worker has written it."""
    result: Facts | None
    claims: list["Incarnation"]
    commit: "Commit | None"
    """The newest that counts."""
    committed_at: datetime | None
    """By the store's clock; None if a newer commit has taken its place since."""
    account: Facts
    """That of the newest commit, read only where nothing newer has one."""
    is_paused: bool
    script: Facts | None
    """What is run, if it is a script under `tidepool.run`."""
    script_end: Facts | None


def _read(store: ObjectStore, name: str, seen: Look) -> _Stored:
    from tidepool.checkpoint import Commit, Incarnation, RunLog, read_manifest, visible_commits

    entries = RunLog(store, name).read()
    commit = next(iter(visible_commits(entries.values())), None)
    at = {info.key: info.modified_at for info in store.list(f"runs/{name}/log/")}
    number = next((number for number, entry in entries.items() if isinstance(entry, Commit) and entry == commit), None)
    result, account = _document(store, f"runs/{name}/result.json"), {}
    if commit is not None and result is None and seen.runs.get(name) is None:
        with suppress(CorruptCheckpointError):  # removed since the log was read, or damaged: who resumes the run is told
            account = read_manifest(store, name, commit).get("account", {})
    return _Stored(
        name=name,
        spec=_document(store, f"runs/{name}/spec.json"),
        result=result,
        claims=[entry for entry in entries.values() if isinstance(entry, Incarnation)],
        commit=commit,
        committed_at=at.get(f"runs/{name}/log/{number}.json"),
        account=account,
        is_paused=paused_step(store, name) is not None,
        script=_document(store, f"runs/{name}/script.json"),
        script_end=_document(store, f"runs/{name}/finished.json"),
    )


def _document(store: ObjectStore, key: str) -> Facts | None:
    """A document, None if there is none. Those who write them (`training.pins`, `training.worker`) bring torch along."""
    try:
        return find_json(store, key)
    except ValueError as error:
        raise StoreError(f"{key} in {store.url} is damaged ({error}): restore it from a backup of the store.") from error


def _summary(stored: _Stored, seen: Look, now: datetime) -> Facts:
    """What is told of a run in the list."""
    result, commit, live = stored.result or {}, stored.commit, seen.runs.get(stored.name)
    idle = "paused" if stored.is_paused else "unfinished" if stored.script else "not running"
    state = "finished" if result or stored.script_end else "training" if stored.name in seen.runs else idle
    # The commit may be newer than what the run said: the cluster was asked first.
    reached = (
        (stored.script_end or {}).get("num_steps") or result.get("steps") or max((live or {}).get("step", 0), commit.step if commit else 0)
    )
    return {
        "name": stored.name,
        "state": state,
        "step": reached,
        "steps": stored.spec["spec"]["training"]["steps"] if stored.spec else None,
        "commit": _commit_facts(commit, stored.committed_at, now) if commit else None,
        "groups": len(live["groups"]) if live and state == "training" else None,
        "wanted_groups": live["wanted_groups"] if live and state == "training" else None,
        "goodput": _account(stored, seen).get("goodput"),
        "published": result.get("published"),
    }


def _commit_facts(commit: "Commit", committed_at: datetime | None, now: datetime) -> Facts:
    age_s = max(0.0, (now - committed_at).total_seconds()) if committed_at else None
    at = committed_at.isoformat() if committed_at else None
    return {"name": commit.name, "step": commit.step, "incarnation": commit.incarnation, "committed_at": at, "age_s": age_s}


def _account(stored: _Stored, seen: Look) -> Facts:
    """Where the time went (see `training.ledger`), from the newest who knows; {} if nobody does."""
    live = seen.runs.get(stored.name) or {}
    return stored.result or live.get("account") or stored.account


def _details(stored: _Stored, seen: Look, now: datetime) -> Facts:
    """What is told of a run by itself."""
    summary, account, document = _summary(stored, seen, now), _account(stored, seen), stored.spec or {}
    live = seen.runs.get(stored.name) if summary["state"] == "training" else None
    return {
        **summary,
        "script": _chosen(stored.script, _SCRIPT) if stored.script else None,
        "spec_digest": document.get("spec_digest"),
        "pins": _chosen(document["pins"], _PINS) if document else None,
        "incarnations": [{"number": one.number, "base": one.base.name if one.base else None} for one in stored.claims],
        "account": _chosen(account, _ACCOUNT) if "goodput" in account else None,
        "result": _chosen(stored.result, _RESULT) if stored.result else None,
        "live": _chosen(live, _LIVE) | {"workers": [_chosen(one, _WORKER) for one in live["workers"]]} if live else None,
    }


def _chosen(value: Mapping[str, Any], keys: Iterable[str]) -> Facts:
    return {key: value.get(key) for key in keys}


# --- From the facts to text and JSON --------------------------------------------------------------------------------


def _print_json(store: ObjectStore, seen: Look, facts: Facts) -> None:
    cluster = {"asked": not seen.problem, "problem": seen.problem or None}
    print(json.dumps({"store": store.url, "cluster": cluster, **facts}, indent=2))


def _doubt(seen: Look, runs: Iterable[Facts]) -> list[str]:
    """A word on what nobody could be asked about."""
    is_open = seen.problem and any(run["state"] == "not running" for run in runs)
    return ["", f"Whether anything trains now was not asked: {seen.problem}."] if is_open else []


def _row(run: Facts) -> tuple[str, ...]:
    commit = run["commit"]
    return (
        run["name"],
        run["state"],
        _of(run["step"], run["steps"]),
        f"{commit['step']}, {_ago(commit)}" if commit else "-",
        _of(run["groups"], run["wanted_groups"]) if run["groups"] is not None else "-",
        f"{run['goodput']:.1%}" if run["goodput"] is not None else "-",
        run["published"] or "-",
    )


def _lines(run: Facts) -> list[str]:
    commit, claims, pins = run["commit"], run["incarnations"], run["pins"] or {}
    base = f"{pins['base']} (digest {pins['base_digest']})" if pins.get("base") else "none: a new model" if pins else "-"
    made_from = {
        "spec digest": run["spec_digest"] or "- (no worker has begun yet)",
        "dataset": pins.get("dataset", "-"),
        "base": base,
    }
    if script := run["script"]:
        made_from = {"script": " ".join([script["script"], *script["arguments"]]), "sha256": script["sha256"]}
    shown = {
        "run": run["name"],
        "state": run["state"],
        "step": _of(run["step"], run["steps"]),
        **made_from,
        "incarnations": f"{len(claims)}, the newest from {_origin(claims[-1]['base'])}" if claims else "0",
        "commit": f"step {commit['step']}, {_ago(commit)}: {commit['name']}" if commit else "none yet",
    }
    shown |= _account_lines(run) | _result_lines(run["result"] or {})
    lines = [f"{key:>16}  {value}" for key, value in shown.items()]
    return lines + (_live_lines(run["live"]) if run["live"] else [])


def _origin(base: str | None) -> str:
    return f"commit {base}" if base else "the beginning"


def _account_lines(run: Facts) -> dict[str, str]:
    account = run["account"]
    if account is None:
        return {"goodput": "-"}
    until = "" if run["result"] or run["live"] else ", up to that commit"
    rest = sorted((account["rest"] or {}).items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {span(time_s)}" for name, time_s in rest if time_s >= 0.05)
    return {
        "goodput": f"{account['goodput']:.1%} of {span(account['wall_s'])}{until}",
        "the rest": spent or "-",
        "quorum changes": str(account["quorum_changes"]),
        "recomputed": f"{account['recomputed_steps']} steps",
    }


def _result_lines(result: Facts) -> dict[str, str]:
    if not result:
        return {}
    return {
        "samples": str(result["samples"]),
        "loss": f"{result['first_loss']:.6g} -> {result['last_loss']:.6g}",
        "held-out loss": f"{result['held_out_loss_before']:.6g} -> {result['held_out_loss_after']:.6g}",
        "published": result["published"] or "-",
        **{key.replace("_", " "): result[key] for key in _SHA256S},
    }


def _live_lines(live: Facts) -> list[str]:
    doing = "stopping" if live["stopping"] else "taking steps" if live["is_stepping"] else "not taking steps"
    quorum = f"{live['quorum']}, {doing}" if live["quorum"] else "none yet"
    groups = ", ".join(map(str, live["groups"])) or "none"
    rows: list[tuple[str, ...]] = [("GROUP", "RANK", "NODE", "PID", "PHASE", "STEP", "SCORE")]
    for worker in live["workers"]:
        keys = ("group", "rank", "node_ip", "pid", "phase", "step")
        score = "-" if worker["score"] is None else f"{worker['score']:.2f}"
        rows.append((*("-" if worker[key] is None else str(worker[key]) for key in keys), score))
    return [
        f"{'quorum':>16}  {quorum}",
        f"{'replica groups':>16}  {groups} ({_of(len(live['groups']), live['wanted_groups'])} wanted)",
        "",
        *table(rows),
    ]


def _of(number: int, total: int | None) -> str:
    return f"{number} of {total}" if total is not None else str(number)


def _ago(commit: Facts) -> str:
    return f"{span(commit['age_s'])} ago" if commit["age_s"] is not None else "replaced since"
