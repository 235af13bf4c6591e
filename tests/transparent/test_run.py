"""What `tidepool.run` promises around a script: whole commits, no computing in a replay, SIGTERM, an end that is an end, refusals."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transparent.runs import ROOT, Starter
from tidepool.checkpoint import RunLog, read_manifest, verify
from tidepool.cli import main as tidepool
from tidepool.storage import open_store, put_json

SMALL = """
import torch
from safetensors.torch import save_file
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters())
x = torch.randn(12, 4)
for step in range(12):
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    optimizer.step()
    print(step, loss.item(), flush=True)
save_file(model.state_dict(), "model.safetensors")
"""
EVERY_2 = ["--every-steps", "2"]


def write(starter: Starter, text: str) -> Path:
    script = starter.folder / "script.py"
    script.write_text(text)
    return script


def test_a_replay_does_not_compute(starter: Starter) -> None:
    script = write(starter, SMALL)
    assert starter.resumable(script, options=EVERY_2, on=r"committed step 8$").status == -9
    again = starter.resumable(script, options=EVERY_2, count_calls=True)
    base = int(re.search(r"arrived at step (\d+)", again.messages)[1])  # type: ignore[index]
    computed = int(re.search(r"Linear computed (\d+) times", again.messages)[1])  # type: ignore[index]
    assert base >= 8
    assert computed == 2 + 2 * (12 - base), "each Linear once to see what it gives, and in the steps after the commit"
    assert len(again.output.splitlines()) == 12


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("after_it", [False, True])
def test_killed_in_the_middle_of_a_commit_the_one_before_counts_or_a_whole_one(starter: Starter, after_it: bool) -> None:
    script = write(starter, SMALL)
    expected = starter.plain(script).output
    bases = []
    for put in (1, 4, 6, 7, 9):  # of: identity, claim, memory, journal, manifest, log, then those of the next commit
        killed = starter.resumable(script, options=EVERY_2, kill_at_put=put, after_it=after_it)
        assert killed.status == -9
        bases += [commit.step for commit in RunLog(open_store(starter.store_url), "r").visible_commits()[:1]]
        for commit in RunLog(open_store(starter.store_url), "r").visible_commits():
            verify(open_store(starter.store_url), "r", commit)
    assert bases == sorted(bases)
    last = starter.resumable(script, options=EVERY_2)
    assert (last.status, last.output) == (0, expected), last.messages


def test_sigterm_commits_the_next_step_and_ends_with_143(starter: Starter) -> None:
    script = write(starter, SMALL.replace("range(12)", "range(100_000)").replace("flush=True", "flush=False"))
    stopped = starter.resumable(script, options=EVERY_2, on=r"committed step 4$", signal_to_send=signal.SIGTERM)
    assert stopped.status == 143
    step = int(re.search(r"stopped after step (\d+), which is committed", stopped.messages)[1])  # type: ignore[index]
    assert RunLog(open_store(starter.store_url), "r").visible_commits()[0].step == step
    again = starter.resumable(script, options=EVERY_2, on="arrived at step", signal_to_send=signal.SIGTERM)
    assert again.status == 143
    assert f"arrived at step {step}" in again.messages


def test_a_finished_run_is_not_run_again_and_retention_keeps_three(starter: Starter) -> None:
    script = write(starter, SMALL)
    assert starter.resumable(script, options=EVERY_2).committed == [2, 4, 6, 8, 10, 12]
    commits = RunLog(open_store(starter.store_url), "r").visible_commits()
    assert [commit.step for commit in commits] == [12, 10, 8]
    assert {one["name"] for one in read_manifest(open_store(starter.store_url), "r", commits[0])["objects"]} == {
        "memory.safetensors",
        "journal.safetensors",
    }
    again = starter.resumable(script, options=EVERY_2)
    assert (again.status, again.output) == (0, "")
    assert "run r is finished, after step 12" in again.messages


def test_what_a_script_leaves_unseeded_is_the_same_in_every_start(starter: Starter) -> None:
    text = SMALL.replace("torch.manual_seed(0)", "import random, numpy\nprint(random.random(), numpy.random.rand())")
    killed = starter.resumable(write(starter, text), options=EVERY_2, on=r"committed step 4$")
    again = starter.resumable(write(starter, text), options=EVERY_2)
    assert again.status == 0
    assert again.output.splitlines()[:4] == killed.output.splitlines()[:4]


def test_a_script_that_has_changed_is_refused(starter: Starter) -> None:
    starter.resumable(write(starter, SMALL), options=EVERY_2, on=r"committed step 4$")
    changed = starter.resumable(write(starter, SMALL.replace("range(12)", "range(13)")), options=EVERY_2)
    assert (changed.status, changed.output) == (1, "")
    assert "Run r began with something else: sha256 was" in changed.messages
    arguments = starter.resumable(write(starter, SMALL), "--more", options=EVERY_2)
    assert "arguments was [] and is ['--more']" in arguments.messages
    assert starter.resumable(write(starter, SMALL), options=EVERY_2).status == 0


def test_a_file_beside_the_script_that_has_changed_is_refused(starter: Starter) -> None:
    beside = starter.folder / "beside.py"
    beside.write_text("RATE = 0.001\n")
    script = write(starter, SMALL.replace("import torch\n", "import sys\nsys.path.insert(0, '.')\nimport torch\nimport beside\n", 1))
    starter.resumable(script, options=EVERY_2, on=r"committed step 4$")
    beside.write_text("RATE = 0.002\n")
    changed = starter.resumable(script, options=EVERY_2)
    assert changed.status == 1
    assert "Since the last commit beside.py changed" in changed.messages


@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("for step", "if made:\n    x = x * 2\nfor step", "Up to step 1 the script did not do again what it did before"),
        (
            "    print(",
            "    if made and step == 1:\n        loss = loss * 2\n    print(",
            "Between steps 2 and 3 the script did not do again",
        ),
        ("range(12)", "range(3 if made else 12)", "The script ended before step"),
        ("    print(", "    if made and step == 1:\n        continue\n    print(", "Between steps 2 and 3 the script did not do again"),
    ],
)
def test_a_script_that_goes_another_way_is_found_before_it_computes(starter: Starter, where: str, what: str, message: str) -> None:
    made = "import os\nmade = os.path.exists('made')\nopen('made', 'w').close()\nmodel ="
    script = write(starter, SMALL.replace(where, what).replace("model =", made, 1))
    starter.resumable(script, options=EVERY_2, on=r"committed step 4$")
    again = starter.resumable(script, options=EVERY_2)
    assert again.status == 1
    assert message in again.messages
    assert "arrived" not in again.messages


REFUSED = [
    ("model = torch.compile(model)", "uses torch.compile"),
    ("torch.distributed.init_process_group('gloo')", "is one of several processes"),
    ("model[0].weight.register_hook(lambda g: g * 2)", "has a hook on its gradient (register_hook)"),
    ("model[0].register_full_backward_hook(lambda *_: None)", "has a hook in the backward pass"),
    ("x = x.clone(); x.requires_grad = True", "gives a gradient to a tensor of the shape (12, 4) that is in no module"),
    ("import threading; t = threading.Thread(target=model, args=(x,)); t.start(); t.join()", "computes in a thread of its own"),
    ("torch.save({}, open('f', 'wb'))", "gives torch.save an open file"),
    ("model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 1)); x = x.argmax(1)\n"
     "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)", "is a tensor of the layout torch.sparse_coo"),
    ("from torch.utils.flop_counter import FlopCounterMode; mode = FlopCounterMode(display=False); mode.__enter__()",
     "watches PyTorch's operations itself"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_cannot_be_made_resumable_is_said_before_the_first_step(starter: Starter, line: str, message: str) -> None:
    refused = starter.resumable(write(starter, SMALL.replace("for step", f"{line}\nfor step")), options=EVERY_2)
    assert refused.status == 1
    assert message in refused.messages
    assert refused.messages.splitlines()[-1].startswith("error: ")
    assert refused.output == ""


def test_several_processes_are_refused_before_anything_runs(starter: Starter) -> None:
    refused = starter.resumable(write(starter, "print('ran')"), environment={"WORLD_SIZE": "2"})
    assert (refused.status, refused.output) == (1, "")
    assert "WORLD_SIZE is 2" in refused.messages
    assert not (starter.folder / "store" / "runs").exists()


def test_a_name_of_another_kind_of_run_is_refused(starter: Starter) -> None:
    store = open_store(starter.store_url)
    put_json(store, "runs/r/spec.json", {})
    refused = starter.resumable(write(starter, "print('ran')"))
    assert (refused.status, refused.output) == (1, "")
    assert "is no run of a script. Choose another --run." in refused.messages
    nameless = starter.resumable(write(starter, "print('ran')"), options=["--run", "a/b"])
    assert "'a/b' cannot name a run" in nameless.messages


def test_a_script_that_fails_shows_its_error_and_goes_on_from_the_commit_before(starter: Starter) -> None:
    script = write(
        starter, SMALL.replace("    optimizer.step()", "    if step == 7:\n        int(input_of_the_script)\n    optimizer.step()")
    )
    failed = [starter.resumable(script, options=EVERY_2) for _ in range(2)]
    assert [one.status for one in failed] == [1, 1]
    assert all("NameError: name 'input_of_the_script' is not defined" in one.messages for one in failed)
    assert failed[0].committed == [2, 4, 6]
    assert "arrived at step 6" in failed[1].messages
    assert failed[0].output == failed[1].output


def test_a_graph_that_is_kept_across_steps_makes_commits_wait(starter: Starter) -> None:
    text = SMALL.replace("x = torch.randn(12, 4)", "x = torch.randn(12, 4).requires_grad_()\nfrozen = nn.Linear(4, 4)")
    text = text.replace("    optimizer.zero", "    if step % 4 == 0:\n        kept = (x * frozen(x)).sum()\n    optimizer.zero")
    text = text.replace("    print(", "    if step % 4 == 2:\n        print(torch.autograd.grad(kept, x)[0].sum())\n    print(")
    script = write(starter, text)
    plain = starter.plain(script)
    assert plain.status == 0, plain.messages
    first = starter.resumable(script, options=["--every-steps", "1"], on=r"committed step 8$")
    assert first.committed[:2] == [4, 8], "after steps 1 to 3 of each four `kept` may be used, and is after the third"
    again = starter.resumable(script, options=["--every-steps", "1"])
    assert (again.status, again.output) == (0, plain.output), again.messages


@pytest.mark.slow
def test_the_command_itself_fixes_hashes_and_takes_the_store_from_the_environment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SMALL + "\nimport sys\nprint(sys.argv[1:], hash('text'))\nsys.exit(5 if len(sys.argv) > 1 else 0)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "TIDEPOOL_STORE": f"file://{tmp_path}/store", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tidepool.run", "--run", "r", "--every-steps", "12", str(script), "--epochs", "3"]
    ran = [subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [one.returncode for one in ran] == [5, 5]
    assert ran[0].stdout == ran[1].stdout
    assert "['--epochs', '3']" in ran[0].stdout
    assert "arrived at step 12" in ran[1].stderr, "a commit on its way is waited for, however the script ends"


@pytest.mark.long
def test_tidepool_runs_tells_of_a_script(starter: Starter, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*command: str) -> str:
        status = tidepool(["runs", *command, "--store", starter.store_url])
        out, err = capsys.readouterr()
        assert status == (1 if err else 0)
        return out + err

    script = write(starter, SMALL)
    assert starter.resumable(script, options=EVERY_2, on=r"committed step 4$").status == -9
    assert re.search(r"^r +unfinished +\d+ ", told("list"), re.MULTILINE)
    assert "start it again with the command that began it" in told("resume", "r")
    assert starter.resumable(script, options=EVERY_2).status == 0
    assert re.search(r"^r +finished +12 ", told("list"), re.MULTILINE)
    shown = told("show", "r")
    assert re.search(r"^ +script  script.py$", shown, re.MULTILINE)
    assert "dataset" not in shown
