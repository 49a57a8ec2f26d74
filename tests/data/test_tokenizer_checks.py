import json
import shutil

from small_data import byte_tokenizer
from transformers import AutoTokenizer, CTRLTokenizer

from fastpref.data.tokenizer_checks import tokenizer_digest

EOS = "</s>"


def test_calling_a_tokenizer_leaves_no_trace_in_its_digest():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = EOS
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != before


def test_a_setting_that_takes_special_tokens_for_text_changes_the_digest(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"split_special_tokens": True}))
    split = AutoTokenizer.from_pretrained(tmp_path)
    ids = [each(["a</s>"])["input_ids"] for each in (tokenizer, split)]
    assert ids[0] != ids[1]
    assert tokenizer_digest(tokenizer) != tokenizer_digest(split)


def slow_tokenizer(folder, *, merges):
    """A tokenizer that runs in Python, whose vocabulary does not say in which order it merges."""
    folder.mkdir(exist_ok=True)
    pieces = ["<unk>", EOS, *("a", "b", "c", "a@@", "b@@", "c@@"), *("bc", "abc", "ab@@")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": CTRLTokenizer.__name__, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def test_merges_of_a_tokenizer_in_python_change_its_digest_and_its_folder_does_not(tmp_path):
    before = slow_tokenizer(tmp_path / "one", merges=["a b", "b c</w>"])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert not before.is_fast
    assert tokenizer_digest(copy) == tokenizer_digest(before)
    after = slow_tokenizer(tmp_path / "one", merges=["b c</w>", "a b"])
    assert after.get_vocab() == before.get_vocab()
    assert after.tokenize("abc") != before.tokenize("abc")
    assert tokenizer_digest(after) != tokenizer_digest(before)
