"""`tidepool models import | merge | export`: models that come from elsewhere, leave, or become one with their adapter.

What they do is in `models.imported`, `models.merged` and `registry`; torch is loaded only where one of them is run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from tidepool import models
from tidepool.errors import SpecError
from tidepool.registry import ModelVersion, Registry
from tidepool.storage import ObjectStore, fill_folder, local_disk

OpenStore = Callable[[argparse.Namespace], ObjectStore]


def add_model_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", open_store: OpenStore
) -> list[argparse.ArgumentParser]:
    """Add the commands to those of `tidepool models`; each sets `run`, which takes its store from `open_store`. Returns them."""
    importing = commands.add_parser("import", help="publish a model or a LoRA adapter that was trained elsewhere")
    importing.add_argument("source", metavar="FOLDER_OR_URL", help="a folder, s3://bucket/prefix, or org/name of the Hugging Face hub")
    importing.add_argument("--name", required=True, help="the name to publish it under")
    importing.add_argument("--base", metavar="REF", help="what it was trained on; an adapter needs it")
    importing.set_defaults(run=lambda options: _import(options, open_store(options)))
    merging = commands.add_parser("merge", help="publish an adapter and its base as one whole model")
    merging.add_argument("model", metavar="ADAPTER", help="name, name@version or name:alias")
    merging.add_argument("--name", required=True, help="the name to publish it under")
    merging.set_defaults(run=lambda options: _merge(options, open_store(options)))
    for command in (importing, merging):
        command.add_argument("--alias", default="production", help="the alias that moves to it (default: production)")
    exporting = commands.add_parser("export", help="write a version into a new folder, as plain transformers or peft reads it")
    exporting.add_argument("model", metavar="REF", help="name, name@version or name:alias")
    exporting.add_argument("folder", metavar="FOLDER", help="a folder that is not there yet")
    exporting.set_defaults(run=lambda options: _export(options, open_store(options)))
    return [importing, merging, exporting]


def _import(options: argparse.Namespace, store: ObjectStore) -> None:
    version = models.import_model(options.source, options.name, options.base, options.alias, store, models.cache_folder())
    print(f"Imported {_described(version)} from {version.lineage['imported_from']}; {version.name}:{options.alias} is {version.ref} now.")


def _merge(options: argparse.Namespace, store: ObjectStore) -> None:
    version = models.merge_model(options.model, options.name, options.alias, store, models.cache_folder())
    print(f"Merged {version.lineage['merged']} and {version.base} into {version.ref}; {version.name}:{options.alias} is {version.ref} now.")


def _export(options: argparse.Namespace, store: ObjectStore) -> None:
    registry, target = Registry(store), Path(options.folder).absolute()
    version = registry.resolve(options.model)
    if target.exists():
        raise SpecError(f"{target} is there already: give a folder that is not there yet.")
    with local_disk(target.parent, "export to a folder on a larger disk"):
        fill_folder(target, lambda folder: registry.download(version, folder))
        target.chmod(0o755)
    print(f"Exported {_described(version)} to {target}. In Python:")
    if version.kind == "full":
        print(f'  model = transformers.AutoModelForCausalLM.from_pretrained("{target}")')
    else:
        print("  base = transformers.AutoModelForCausalLM.from_pretrained(BASE)" + _base_hint(version))
        print(f'  model = peft.PeftModel.from_pretrained(base, "{target}")')


def _described(version: ModelVersion) -> str:
    return version.ref if version.kind == "full" else f"{version.ref} (an adapter on {version.base})"


def _base_hint(version: ModelVersion) -> str:
    is_published = version.base is not None and "/" not in version.base
    return f"  # BASE: the folder of `tidepool models export {version.base} FOLDER`" if is_published else f"  # BASE: {version.base}"
