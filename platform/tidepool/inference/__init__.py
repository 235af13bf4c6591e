"""Inference: the engine's interface, and a plain batched engine. Knows no Ray and no HTTP."""

from tidepool.inference.engine import Engine, EngineStats, FinishReason, GenerationRequest, Output, SamplingParameters

__all__ = ["Engine", "EngineStats", "FinishReason", "GenerationRequest", "Output", "SamplingParameters"]
