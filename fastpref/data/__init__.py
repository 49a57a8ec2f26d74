"""Rows: from a named source to token ids.

Enters: names of datasets, files, a tokenizer. Leaves: a `PreferenceSplit`, encoded rows in the
cache of `datasets` and the account of what became of every row, in words and as a page. To be
changed here: a source, a layout of rows, which rows a split has, how text becomes tokens. Nothing
here knows of a model.
"""
