import pytest
from chat_templates import (
    CHATML_TOOLS,
    MISTRAL,
    PairsOfCharacters,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from small_data import TEMPLATE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpref.data.chat import ChatFormat
from fastpref.data.counts import JOINED_ROWS
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import EMPTY_RESPONSE, parse_row
from fastpref.data.remarks import Remark
from fastpref.data.row_tokens import (
    RowTexts,
    divide_by_offsets,
    row_texts,
    tokenize_rows,
    without_final_eos,
)
from fastpref.errors import ConfigError


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def chat_row(yes="yes", no="no", **fields):
    record = {
        "prompt": [say("user", "Q")],
        "chosen": [say("assistant", yes)],
        "rejected": [say("assistant", no)],
    }
    record |= fields
    return parse_row(record, weighted=False, allow_roles=False)


def tokens_of(row, tokenizer, *, sides=("chosen", "rejected"), first=0):
    chat = ChatFormat(tokenizer=tokenizer, template=None)
    texts = row_texts(row, {side: row[side] for side in sides}, chat)
    [tokens] = tokenize_rows([texts], tokenizer, first=first)
    return tokens


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


ENDING_IN_SPACE = TEMPLATE.replace("'[' + m['role'] + ']'", "m['role'] + ': '").replace(
    "[assistant]", "assistant: "
)


@pytest.mark.parametrize(
    ("tokenizer", "chosen"),
    [
        (metaspace_tokenizer(MISTRAL), ["▁yes"]),
        (metaspace_tokenizer(CHATML_TOOLS, eos_token="<|im_end|>"), ["yes"]),
        (byte_level_tokenizer(CHATML_TOOLS), ["yes"]),
        (byte_level_tokenizer(MISTRAL, eos_token="</s>"), ["Ġyes"]),
    ],
)
def test_tokens_of_a_conversation_are_those_of_the_whole_rendered_text(tokenizer, chosen):
    row = chat_row()
    tokens = tokens_of(row, tokenizer)
    assert pieces(tokenizer, tokens.responses[0]) == chosen
    assert not tokens.remarks
    for side, response in zip(("yes", "no"), tokens.responses, strict=True):
        messages = [say("user", "Q"), say("assistant", side)]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        given = [*tokens.prompt, *response, tokenizer.eos_token_id]
        assert given == whole[: len(given)]
        # after EOS at most a line break
        assert tokenizer.decode(whole[len(given) :]).strip() == ""
    asked = tokenizer.apply_chat_template(
        [say("user", "Q")], add_generation_prompt=True, return_dict=False
    )
    assert tokens.prompt == asked


def test_a_token_over_the_border_belongs_to_the_response_and_the_prompt_is_one_for_both():
    tokenizer = byte_level_tokenizer(ENDING_IN_SPACE, eos_token="</s>")
    tokens = tokens_of(chat_row("yes", "maybe"), tokenizer)
    assert pieces(tokenizer, tokens.prompt)[-1] == ":"
    assert [pieces(tokenizer, part)[0] for part in tokens.responses] == ["Ġyes", "Ġ"]
    assert tokens.remarks == Remark.BORDER_TOKEN
    # neither crosses the border, so the space stays with the prompt
    tokens = tokens_of(chat_row("maybe", "12"), tokenizer)
    assert pieces(tokenizer, tokens.prompt)[-1] == "Ġ"
    assert not tokens.remarks
    assert tokens_of(chat_row("yes"), tokenizer, sides=("chosen",)).remarks == Remark.BORDER_TOKEN


def test_a_blank_at_the_border_that_no_token_has_is_no_token_over_it():
    words = ["[UNK]", "</s>", "user", "assistant", ":", "q", "yes", "no"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    pieces_of_words = Tokenizer(model)
    pieces_of_words.normalizer = normalizers.BertNormalizer()
    pieces_of_words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces_of_words, eos_token="</s>", chat_template=ENDING_IN_SPACE
    )
    tokens = tokens_of(chat_row(), tokenizer)
    assert [tokenizer.decode(part) for part in tokens.responses] == ["yes", "no"]
    assert tokenizer.decode(tokens.prompt).endswith(":")
    assert not tokens.remarks


def test_the_longest_common_run_within_the_prompt_is_the_prompt():
    spans = [(0, 1), (1, 2), (2, 4), (4, 5)]
    assert divide_by_offsets(4, [[1, 2, 3, 4]], [spans]) == 3
    assert divide_by_offsets(3, [[1, 2, 3, 4]], [spans]) == 2
    assert divide_by_offsets(4, [[1, 2, 3, 4], [1, 9, 3]], [spans, spans[:3]]) == 1
    assert divide_by_offsets(9, [[1, 2], [1, 2]], [spans[:2], spans[:2]]) == 2


@pytest.mark.parametrize(
    ("question", "prompt", "response", "remarks"),
    [
        ("Q", ["u:", "Q.", "a:"], ["ye", "s."], Remark(0)),
        ("QQ", ["u:", "QQ", ".a", ":"], ["ye", "s."], Remark.TOKENIZED_APART),
    ],
)
def test_a_tokenizer_without_offsets_divides_where_the_tokens_agree(
    question, prompt, response, remarks
):
    tokenizer = PairsOfCharacters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '.' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    assert not tokenizer.is_fast
    tokens = tokens_of(chat_row(prompt=[say("user", question)]), tokenizer)
    assert pieces(tokenizer, tokens.prompt) == prompt
    assert pieces(tokenizer, tokens.responses[0]) == response
    # the template has no EOS
    assert tokens.remarks == remarks | Remark.EOS_ADDED


def test_texts_are_tokenized_apart_and_it_is_noted_where_together_they_are_other_tokens():
    def note(tokenizer, prompt, chosen, first=0):
        record = {"prompt": prompt, "chosen": chosen, "rejected": " no"}
        row = parse_row(record, weighted=False, allow_roles=False)
        tokens = tokens_of(row, tokenizer, first=first)
        alone = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, chosen, " no")
        ]
        assert [tokens.prompt, *tokens.responses] == alone
        return tokens.remarks

    assert not note(byte_level_tokenizer(), "Q:", " yes")
    assert note(byte_level_tokenizer(), "Q:", ":yes") == Remark.JOINED_DIFFERS
    # every text begins with a dummy
    assert note(metaspace_tokenizer(), "Q:", "yes") == Remark.JOINED_DIFFERS
    assert not note(metaspace_tokenizer(), "Q:", "yes", first=JOINED_ROWS)


def test_only_the_first_rows_of_text_are_looked_at():
    rows = [RowTexts("Q:", [":yes", ":no"]), RowTexts(error=RowError("bad"))] * 3
    outcomes = tokenize_rows(rows, byte_level_tokenizer(), first=JOINED_ROWS - 3)
    remarks = [None if isinstance(tokens, RowError) else tokens.remarks for tokens in outcomes]
    assert remarks == [Remark.JOINED_DIFFERS, None, Remark.JOINED_DIFFERS, None, Remark(0), None]


def test_a_response_is_empty_where_the_template_makes_nothing_of_it():
    silent = chat_row(chosen=[say("assistant", "", reasoning_content="hm")])
    tokens = tokens_of(silent, byte_level_tokenizer(CHATML_TOOLS))
    assert tokens.drop == EMPTY_RESPONSE
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = chat_row(chosen=[say("assistant", None, tool_calls=[call])])
    assert not tokens_of(calls, byte_level_tokenizer(CHATML_TOOLS)).drop


def test_a_prompt_without_tokens_is_an_error_of_the_prompt():
    template = "{% for m in messages %}{{ m.content if m.role == 'assistant' else '' }}{% endfor %}"
    error = tokens_of(chat_row(), byte_level_tokenizer(template))
    assert isinstance(error, RowError) and error.field == "prompt"


def test_a_row_that_the_template_refuses_is_its_own_fault_and_a_bad_template_the_configs():
    system = chat_row(system="S")
    error = tokens_of(system, metaspace_tokenizer(MISTRAL))
    assert isinstance(error, RowError) and "only user, assistant and tool" in str(error)
    with pytest.raises(ConfigError, match="cannot render one user and one assistant message"):
        tokens_of(system, metaspace_tokenizer("{{ messages + 1 }}"))


def test_one_spelled_out_eos_is_taken_off_a_response():
    assert without_final_eos([5, 2, 2], 2) == [5, 2]
    assert without_final_eos([2, 5], 2) == [2, 5]
    assert without_final_eos([], 2) == []
