"""Chat templates in the manner of model families, and the tokenizers that go with them."""

import datetime

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

# tools in the system turn, tool calls as JSON between tags, the reasoning of the last answer shown
CHATML_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# prints the date in every system turn
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set system_message = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# shows what follows </think> alone
QWEN3 = """\
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# no system role; items of the arguments one by one, which fails on JSON text
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | default('', true) }}
        {%- for call in message.tool_calls | default([], true) %}
            {{- '[CALL]' + call.function.name }}
            {%- for name, value in call.function.arguments | items %}
                {{- ' ' + name + '=' + (value | tojson) }}
            {%- endfor %}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT]' + message.content }}
    {%- else %}
        {{- raise_exception('only user, assistant and tool roles here') }}
    {%- endif %}
{%- endfor %}
"""

CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]"),
)


def wrapped(tokenizer: Tokenizer, chat_template: str | None, eos_token: str, **options):
    """A tokenizer of transformers with the control tokens of the templates."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos_token, **options
    )
    fast.add_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    fast.chat_template = chat_template
    return fast


def vocabulary_of(alphabet, merges):
    """Ids of an alphabet and of the pairs that are merged."""
    pieces = [*alphabet, *(left + right for left, right in merges)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def byte_level_tokenizer(chat_template=None, eos_token="<|im_end|>"):
    """Bytes, and " yes", " no", "::" as one token each; offsets of words without their space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("n", "o"), ("Ġ", "no"), (":", ":")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary_of(alphabet, merges), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, chat_template, eos_token)


def metaspace_tokenizer(chat_template=None, eos_token="</s>"):
    """Characters, "▁yes" and "▁no", with the dummy "▁" at the beginning of every text."""
    alphabet = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n"]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("n", "o"), ("▁", "no")]
    vocabulary = vocabulary_of(alphabet, merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return wrapped(tokenizer, chat_template, eos_token, unk_token="<unk>")


class PairsOfCharacters(PreTrainedTokenizer):
    """A tokenizer in Python, so without offsets: two characters a token, from the left.

    Decoded there is a blank between any two of them.
    """

    def __init__(self, **options):
        self.known = ["</s>", "<s>"]
        super().__init__(bos_token="<s>", eos_token="</s>", **options)

    @property
    def vocab_size(self):
        return len(self.known)

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.known)}

    def _tokenize(self, text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        if token not in self.known:
            self.known.append(token)
        return self.known.index(token)

    def _convert_id_to_token(self, index):
        return self.known[index]


class Tomorrow(datetime.datetime):
    """The clock of a later day, for `transformers.utils.chat_template_utils.datetime`."""

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2031, 2, 3, 4, 5)
