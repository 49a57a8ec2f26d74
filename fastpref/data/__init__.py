"""Data: from a named source to token ids.

Enters: names of datasets, files, a tokenizer. Leaves: a `PreferenceSplit`, encoded rows in the
cache of `datasets`, and the account of what became of every row, as log lines and as HTML. To be
changed here: sources, row layouts, which rows a split has, tokenization. Nothing here depends on
a model.
"""
