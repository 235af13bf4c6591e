"""Inference: the engine's interface, and a plain batched engine. Knows no Ray and no HTTP."""
