"""The import path of the Serve application: `serve.app:build` (see serve/serve.yaml)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from tidepool.serving.app import build

__all__ = ["build"]
