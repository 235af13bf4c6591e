"""Data: text, JSONL and Parquet in, packed token shards in the object store out, and the global order in which they are read.

Knows no torch and no ray: tokenizers are handed in, samples come out as numpy arrays.
"""

from tidepool.data.dataset import Dataset
from tidepool.data.manifest import DatasetInfo, fetch_tokenizer, find_dataset
from tidepool.data.order import Layout, sample_at
from tidepool.data.packing import Samples
from tidepool.data.preparation import Progress, prepare
from tidepool.data.rows import Document
from tidepool.data.sources import documents, sample_texts

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Document",
    "Layout",
    "Progress",
    "Samples",
    "documents",
    "fetch_tokenizer",
    "find_dataset",
    "prepare",
    "sample_at",
    "sample_texts",
]
