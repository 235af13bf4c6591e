"""The tools that a request offers, and whether the model must call one.

Where it must (`required`, or a function by its name), the answer is held to the call's JSON schema, so that its name and its arguments
are valid; it is one call. Where it may (`auto`), it answers in its own way, and calls are found in its text (`tool_calls`); if a function
is `strict`, the replica holds the calls in the text to the schemas of all.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from tidepool.serving.api.fields import Part, refuse
from tidepool.serving.api.sampling import JsonSchema

MAX_TOOLS = 128


class Function(Part):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


_NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False},
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}


def _choice(value: Any) -> Any:
    if isinstance(value, dict):
        return NamedTool.model_validate(value).function
    if value not in ("none", "auto", "required"):
        raise ValueError('give "none", "auto", "required", or {"type": "function", "function": {"name": ...}}')
    return value


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedFunction,
    PlainValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_TOOL]}),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def check_tools(tools: list[Tool], choice: Any) -> None:
    """Raises `Refusal` for a choice without its tool, and for two tools of one name."""
    names = [tool.function.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        refuse(f"`tools` has {twice[0]} twice: give each function a name of its own.", "tools")
    if choice == "required" and not tools:
        refuse("`tool_choice` requires a tool, and there is none: give `tools`.", "tool_choice")
    if isinstance(choice, NamedFunction) and choice.name not in names:
        refuse(f"`tool_choice` names the function {choice.name[:64]!r}, which is not among `tools`.", "tool_choice")


def forced_schema(tools: list[Tool], choice: Any) -> dict[str, Any] | None:
    """What an answer is held to that must be a call: a named function's arguments, or the name and the arguments of any of the tools."""
    if isinstance(choice, NamedFunction):
        (tool,) = [tool for tool in tools if tool.function.name == choice.name]
        return _parameters(tool, "#")
    if choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _parameters(tool, f"#/anyOf/{index}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    return {"anyOf": calls}


def _parameters(tool: Tool, place: str) -> dict[str, Any]:
    """The schema of a function's arguments, whose references into itself hold at its place in another schema."""
    schema = {"type": "object", **(tool.function.parameters or {"additionalProperties": False})}
    moved: dict[str, Any] = _moved(schema, place)
    return moved


def _moved(node: Any, place: str) -> Any:
    if isinstance(node, list):
        return [_moved(one, place) for one in node]
    if not isinstance(node, dict):
        return node
    moved = {key: _moved(value, place) for key, value in node.items()}
    if isinstance(ref := node.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved
