"""Train a model or an adapter: LoRA or full, on the workers of one Ray Train worker group.

    ray job submit --working-dir . -- python jobs/train.py jobs/lora.yaml

Submitting the same run again continues it from its newest commit, or says what it published. Exit status: 0 finished or paused,
1 an error (one message says what to do), 143 stopped on request after a commit.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from tidepool.training.job import main

if __name__ == "__main__":
    sys.exit(main())
