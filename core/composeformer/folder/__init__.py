"""Weights on disk: written whole or not at all, and read without trusting what a file says of itself."""

from composeformer.folder.atomic import new_folder, write_json, write_text
from composeformer.folder.manifest import check_manifest, write_manifest
from composeformer.folder.paths import inside
from composeformer.folder.reader import TensorInfo, WeightReader
from composeformer.folder.shards import write_shards

__all__ = [
    "TensorInfo",
    "WeightReader",
    "check_manifest",
    "inside",
    "new_folder",
    "write_json",
    "write_manifest",
    "write_shards",
    "write_text",
]
