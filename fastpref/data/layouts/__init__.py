"""Convert the common layouts of preference rows to one form, and check its rules.

The lowest layer of `data`: nothing here depends on where rows are stored, or on a tokenizer.
"""
