"""Holding an answer to a JSON schema, a regular expression or a grammar: which tokens may come next, by llguidance.

A grammar is an automaton over bytes; at each step it tells the tokens whose bytes go on with a text that can still be completed
(Willard and Louf 2023). Once nothing can follow, only tokens that end the text may.

Invariants:
- What the grammar's library does not implement is refused, never ignored. (Keywords that constrain nothing, such as `title`, are none
  of its business.)
- A grammar costs bounded time and memory. Compilation is tried in a process of its own first, which is killed at its limits,
  since nothing can interrupt it in a thread; each step has a budget, beyond which that answer alone fails.
- The state of an answer is a function of its tokens.

JSON has its properties in the schema's order, escapes only where it must, and at most 16 characters of white space in one place:
without a bound a weak model writes nothing else. Regular expressions are Rust's, for the whole answer; \\d, \\w and \\s are ASCII, as in
JSON Schema.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference.sampling_parameters import SamplingParameters

_MAX_CHARACTERS = 65_536
_MANY_REPETITIONS = re.compile(r"\{(\d*,)?\d{5,}")  # a single step of these takes most of a second
_MAX_CACHED = 64
_TRIAL_CPU_S = 5
_TRIAL_TIMEOUT_S = 60.0
_TRIAL_MEMORY_BYTES = 2 * 1024**3
JSON_OPTIONS: Any = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": r"[ \t\n\r]{0,16}"}
_TRIAL = """
import resource, sys
from llguidance import LLMatcher, LLTokenizer
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0)
matcher.compute_bitmask()
sys.stdout.write(matcher.get_error())
"""


class GrammarMatcher:
    """Where one answer stands in its grammar. A token that the grammar does not allow is an error, which stays."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> RequestError | None:
        if not self._matcher.is_error():
            return None
        return RequestError(f"The answer cannot go on by its grammar: {_reason(self._matcher.get_error())}. Simplify the schema.")

    def append(self, token: int) -> None:
        """Take in the next token of the answer, whoever chose it."""
        self._matcher.consume_token(token)

    def fill(self, mask: np.ndarray) -> None:
        """Write a bit for each token (int32 words, the lowest bit first) that says whether it may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


class CompiledGrammar:
    """A grammar for one tokenizer, which any number of answers share."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy())


class Grammars:
    """Compiles grammars for a model of the tokens 0 to `num_tokens` - 1, of which `end_tokens` end a text, and keeps the latest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int], num_tokens: int) -> None:
        self._tokenizer, self._end_tokens, self._num_tokens = tokenizer, end_tokens, num_tokens
        self._tokens: llguidance.LLTokenizer | None = None
        self._limits = llguidance.LLParserLimits(step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], Future[CompiledGrammar]] = OrderedDict()

    async def compile(self, parameters: SamplingParameters) -> CompiledGrammar | None:
        """The grammar that the parameters ask for, or None, while the event loop goes on. Raises `RequestError`, `EngineBusyError`."""
        if (future := self._start(parameters)) is None:
            return None
        return await asyncio.shield(asyncio.wrap_future(future))  # others may wait for it too

    def compile_now(self, parameters: SamplingParameters) -> CompiledGrammar | None:
        """The same for a caller that can wait."""
        future = self._start(parameters)
        return None if future is None else future.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, parameters: SamplingParameters) -> Future[CompiledGrammar] | None:
        forms = {"json_schema": parameters.json_schema, "regex": parameters.regex, "grammar": parameters.grammar}
        kind, text = next(((kind, text) for kind, text in forms.items() if text is not None), ("", None))
        if text is None:
            return None
        with self._lock:
            future = self._compiled.get((kind, text))
            if future is None or _may_succeed_later(future):
                future = self._compiled[kind, text] = self._thread.submit(self._compile, kind, text)
            self._compiled.move_to_end((kind, text))
            while len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return future

    def _compile(self, kind: str, text: str) -> CompiledGrammar:
        if len(text) > _MAX_CHARACTERS:
            raise RequestError(f"The {kind} has {len(text)} characters, and {_MAX_CHARACTERS} are the most: simplify it.")
        for pattern in _patterns(_parse(text)) if kind == "json_schema" else [text]:
            if _MANY_REPETITIONS.search(pattern):
                raise RequestError(f"The {kind} repeats something 10,000 times or more: repeat it less often, or without a bound.")
        grammar = _grammar(kind, text)
        _try(kind, grammar)
        matcher = llguidance.LLMatcher(self._load_tokens(), grammar, log_level=0, limits=self._limits)
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # of the budget for a step, or of a schema that nothing fulfils
            raise RequestError(f"The {kind} cannot be followed: {_reason(first.get_error())}.")
        return CompiledGrammar(matcher)

    def _load_tokens(self) -> llguidance.LLTokenizer:
        if self._tokens is None:
            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise RequestError("The model's tokenizer has no fast version, so it can follow no json_schema and no regex.")
            if not self._end_tokens:
                raise RequestError("The model has no token that ends a text, so it can follow no json_schema and no regex.")
            self._tokens = llguidance.hf.from_tokenizer(self._tokenizer, self._num_tokens, sorted(self._end_tokens))
        return self._tokens


def _may_succeed_later(future: Future[CompiledGrammar]) -> bool:
    return future.done() and not isinstance(future.exception(), RequestError | None)


def _parse(text: str) -> Any:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RequestError(f"The json_schema is no JSON: {error}.") from error
    except RecursionError as error:
        raise RequestError("The json_schema is nested too deeply: simplify it.") from error
    if not isinstance(schema, dict):
        raise RequestError("The json_schema is no JSON object.")
    return schema


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions in a schema, wherever they may be."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            if isinstance(node.get("patternProperties"), dict):
                yield from node["patternProperties"]
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _grammar(kind: str, text: str) -> str:
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(llguidance.regex_to_lark(text, use_ascii="dws"))
    if kind == "grammar":
        return llguidance.LLMatcher.grammar_from_lark(text)
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise RequestError(f"The {kind} cannot be followed: {_reason(str(error))}.") from error


def _try(kind: str, grammar: str) -> None:
    """Compile it where it can be stopped. Raises `RequestError`, and `EngineBusyError` if the machine does not get to it."""
    command = [sys.executable, "-c", _TRIAL, str(_TRIAL_CPU_S), str(_TRIAL_MEMORY_BYTES)]
    try:
        done = subprocess.run(command, input=grammar, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineBusyError(f"The machine was too busy to compile the {kind} in {_TRIAL_TIMEOUT_S:.0f} s. Try again later.") from error
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise RequestError(f"The {kind} takes more than {_TRIAL_CPU_S} s to compile: simplify it.")
    if done.returncode < 0:
        raise RequestError(f"The {kind} takes more than {_TRIAL_MEMORY_BYTES // 2**20} MiB to compile: simplify it.")
    if done.returncode:
        raise RuntimeError(f"The trial of a {kind} failed: {done.stderr[-1000:]}")
    if done.stdout:
        raise RequestError(f"The {kind} cannot be followed: {_reason(done.stdout)}.")


def _reason(message: str) -> str:
    """The line of a message of llguidance that says what is wrong."""
    lines = message.strip().split("\n")
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = line.rpartition("(in regex): ")[2].removesuffix("NoExtensionBias") or "no text fulfils it"
    return line[:200].rstrip(".")
