"""Serving: an OpenAI-compatible gateway before engine replicas. Ray stands in `app` alone; the rest runs and is tested without."""
