"""What a process that waits for a replica group does before anybody needs it."""

import subprocess
import sys

WATCHED = """
import torch, sys
asked = []
def note(name):
    def ask(*args, **named):
        asked.append(name)
        return 0
    return ask
for name in ("is_available", "device_count", "_lazy_init", "current_device", "init"):
    setattr(torch.cuda, name, note(name))
import gc, importlib
from tidepool.training import standby
imported, paused = importlib.import_module, []
standby.import_module = lambda name: (paused.append(not gc.isenabled()), imported(name))
standby.load()
assert all(paused) and gc.isenabled()
assert "tidepool.training.worker" in sys.modules and "transformers" in sys.modules
assert asked == [], asked
"""


def test_waiting_looks_for_no_gpu_since_ray_says_later_which_one_is_the_workers() -> None:
    ended = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
