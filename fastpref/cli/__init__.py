"""The command line: from arguments to an exit code.

Enters: `sys.argv`. Leaves: a task done, or one sentence and a documented exit code. To be
changed here: how options are read and explained, the table of tasks.
"""
