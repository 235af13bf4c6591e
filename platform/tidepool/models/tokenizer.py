"""Training a tokenizer: byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), so that any text has tokens.

Invariants:
- The same texts in the same order give the same tokenizer.
- `<|endoftext|>` is the end of text, the beginning and the padding; `<|im_start|>` and `<|im_end|>` frame the turns of a chat.
- The chat template is ChatML and marks what the assistant says, its `<|im_end|>` included, with `{% generation %}`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tidepool.errors import ModelError

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train on texts; little text gives fewer tokens than `vocab_size`. Raises `ModelError` if there is no text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.num:
        raise ModelError("There is no text to train a tokenizer on: check the inputs of the spec.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def use_chat_template(folder: Path, template: str) -> None:
    """Give the tokenizer of a folder another chat template: the path of a file, or the text (which holds `{{` or `{%`).

    It becomes one of the tokenizer's files, so it goes wherever the tokenizer goes: into the dataset, its digest, and the models
    that are trained on it. Raises `ModelError`.
    """
    if "{{" not in template and "{%" not in template:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"Cannot read the chat template {template}: {getattr(error, 'strerror', None) or error}. Give the path of a Jinja file, "
                "or the template itself, as tokenizer.chat_template."
            ) from error
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


class _Counted:
    """Passes texts on and counts them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.num = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num += 1
            yield text
