"""Real text that every machine has: the source of Python's standard library, and what its docstrings say.

Tests and third-party packages are left out. The order of everything is fixed by names, so that the same Python gives
the same files.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
_MAX_ANSWER_CHARACTERS = 400
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def write_source(folder: Path) -> int:
    """Copy the standard library's modules into `folder`; returns how many there are."""
    num_files = 0
    root = _library()
    for path in _modules():
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8", errors="replace"), encoding="utf-8")
        num_files += 1
    return num_files


def write_chats(path: Path) -> int:
    """Write one chat a line (JSONL, `messages`): a signature asked about, its docstring's first paragraph; returns how many."""
    num_chats = 0
    with path.open("w", encoding="utf-8") as file:
        for module in _modules():
            for question, answer in _pairs(module):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
                num_chats += 1
    return num_chats


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> Iterator[Path]:
    for path in sorted(_library().rglob("*.py")):
        if not _LEFT_OUT.intersection(path.relative_to(_library()).parts):
            yield path


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and files in older encodings are no modules to learn from
        return
    for node in ast.walk(tree):
        if not isinstance(node, _Function):
            continue
        docstring = ast.get_docstring(node)
        paragraph = " ".join((docstring or "").split("\n\n")[0].split())
        if len(paragraph) > 20:
            yield f"def {node.name}({_arguments(node)})", paragraph[:_MAX_ANSWER_CHARACTERS]


def _arguments(node: Any) -> str:
    return ast.unparse(node.args)
