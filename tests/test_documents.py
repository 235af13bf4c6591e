"""The documents are true of the files: links, paths, `make` targets, modules, specs and quoted messages."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from tidepool.specs import DataSpec, EvaluationSpec, RunSpec, ServingSpec, Spec, load_spec, parse_spec

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "platform" / "tidepool"
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "jobs" / "README.md", *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
STRUCTURE = (ROOT / "docs" / "structure.md").read_text()
SPECS: dict[str, type[Spec]] = {
    "jobs/prepare.yaml": DataSpec,
    "jobs/train.yaml": RunSpec,
    "jobs/lora.yaml": RunSpec,
    "jobs/evaluate.yaml": EvaluationSpec,
}
_PLACEHOLDER = re.compile(r"\.\.\.|\b(?:TIDEPOOL_STORE|NAME|STORE|KEY|PATH|N|M|nan)\b|\d+")
_FOREIGN = ("python: not found",)
"""What others say."""

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_STORE", "memory://documents")


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in _anchors(linked.read_text()), f"{target}: there is no such heading"


@every_document
def test_paths_of_the_repository_exist(path: Path) -> None:
    tops = {entry.name for entry in ROOT.iterdir()} - {".git", ".venv", ".tidepool"}
    named = [
        quoted for quoted in re.findall(r"`([\w./*-]+)`", path.read_text()) if quoted.split("/")[0] in tops or quoted.endswith(".yaml")
    ]
    assert [quoted for quoted in named if not list(ROOT.glob(quoted.rstrip("/")))] == []


@every_document
def test_files_in_commands_exist(path: Path) -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL))
    files = re.findall(r"\b(?:jobs|serve|demo|tests|docs)/[\w/]+\.\w+\b", blocks)
    assert [file for file in files if not (ROOT / file).is_file()] == []


@every_document
def test_make_targets_exist(path: Path) -> None:
    targets = re.findall(r"(?:^|`)(?:[A-Z_]+=\S+ )?make ([a-z0-9-]+)", path.read_text(), re.MULTILINE)
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []


def test_the_structure_page_names_every_module_and_no_other() -> None:
    named, package = set(), ""
    for first, module in re.findall(r"^\| (?:`([\w/]+)`)? ?\| (?:`(\w+)`)? ?\|", STRUCTURE, re.MULTILINE):
        package = first or package
        if module:
            named.add(f"{module}.py" if package == "tidepool" else f"{package}/{module}.py")
    modules = {path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.py") if path.name != "__init__.py"}
    assert named == modules


def test_the_readmes_tree_names_what_is_there() -> None:
    [tree] = re.findall(r"```text\n(platform/tidepool/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = [(line.startswith("  "), line.split()[0].rstrip("/")) for line in tree.splitlines()]
    assert [name for inside, name in named if not ((LIBRARY if inside else ROOT) / name).exists()] == []
    packages = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert packages <= {name for inside, name in named if inside}


def test_the_specs_beside_the_jobs_can_be_used() -> None:
    assert {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.yaml")} == SPECS.keys()
    for name, kind in SPECS.items():
        load_spec(ROOT / name, kind)
    for path in (ROOT / "serve").glob("*.yaml"):
        for application in yaml.safe_load(path.read_text())["applications"]:
            parse_spec(application["args"], ServingSpec, source=path.name)


@pytest.mark.parametrize("name", [*SPECS, "serve/serve.yaml"])
def test_the_comments_of_a_spec_tell_its_defaults(name: str) -> None:
    """A key with `(default X)` has that default; any other one that is shown has the default that stands there, or is `needed`."""
    text = (ROOT / name).read_text()
    if name == "jobs/lora.yaml":  # an example; jobs/train.yaml is the one that tells
        text = text[text.index("  lora:") : text.index("training:")]
    told = {key: float(value) for key, value in re.findall(r"^ *(\w+): .*\(default ([\d.e-]+)\)", text, re.MULTILINE)}
    assert told == {key: value for key, value in _defaults(SPECS.get(name, ServingSpec)).items() if key in told}
    shown = dict(re.findall(r"^ *(\w+): ([\d._e-]+)(?: +#(?!.*(?:default|needed)).*)?$", text, re.MULTILINE))
    expected = {key: value for key, value in _defaults(SPECS.get(name, ServingSpec)).items() if key in shown}
    assert {key: float(shown[key]) for key in expected} == expected


def test_messages_are_quoted_as_the_code_says_them() -> None:
    code = " ".join(_literals(path) for folder in (LIBRARY, ROOT / "jobs") for path in sorted(folder.rglob("*.py")))
    errors = (ROOT / "jobs" / "README.md").read_text().partition("## Errors")[2]
    quoted = re.findall(r"^\| `([^`]+)`", errors, re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        parts = [part.strip(" :,()`") for part in _PLACEHOLDER.split(message.replace("`", ""))]
        long = [part for part in parts if len(part) >= 8]
        assert long or message in _FOREIGN, message
        assert [part for part in long if part not in code] == [] or message in _FOREIGN, message


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def _literals(path: Path) -> str:
    """All strings of a file, each put together from its parts, without backquotes."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return " ".join(texts).replace("`", "")


def _defaults(kind: type[Spec]) -> dict[str, float]:
    """The numbers that the keys of a spec, and of the specs in it, have by default; a key of one name has one default."""
    found: dict[str, float] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            found[name] = float(field.default)
        for inner in _inner(field.annotation):
            found |= _defaults(inner)
    return found


def _inner(annotation: object) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in getattr(annotation, "__args__", ()) for spec in _inner(argument)]
