"""Makes a plain PyTorch script resumable without a changed line; `docs/transparent.md` says what is covered."""

from tidepool.transparent.execution import Options, execute

__all__ = ["Options", "execute"]
