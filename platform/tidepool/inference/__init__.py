"""Inference: the engine's interface and its messages. The engine itself is in `paged`. Knows no Ray and no HTTP."""

from tidepool.inference.engine import Engine, EngineStats, FinishReason, GenerationRequest, Output, TokenLogprobs
from tidepool.inference.sampling_parameters import SamplingParameters

__all__ = ["Engine", "EngineStats", "FinishReason", "GenerationRequest", "Output", "SamplingParameters", "TokenLogprobs"]
